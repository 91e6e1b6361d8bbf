/*
 * libpageferry_xen.so: saves and restores domains of Xen 4.17 to 4.20, to the interface of the two functions of these
 * names in Xen's libxenguest. It needs neither libxenguest nor libxenctrl:
 *
 *     cc program.c -lpageferry_xen
 *
 * Where xenguest.h is included too, before this file, its types are used, and the compiler compares the functions.
 *
 * Both return 0, or -1 with errno set and a line in the log of `xch`: through xc_report_error where this process has
 * libxenctrl, else on standard error. `xch` may be a null pointer.
 */
#ifndef PAGEFERRY_XEN_H
#define PAGEFERRY_XEN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef XENGUEST_H

/* What libxenctrl's xc_interface_open returns; never looked into here. */
typedef struct xc_interface_core xc_interface;

/* Flags of a save: while the guest runs; with a second pass for the other end to compare. */
#define XCFLAGS_LIVE  (1 << 0)
#define XCFLAGS_DEBUG (1 << 1)

/* The two others are left to a libxenguest behind this library; without one they are refused with EOPNOTSUPP. */
typedef enum { XC_STREAM_PLAIN, XC_STREAM_REMUS, XC_STREAM_COLO } xc_stream_type_t;

/* How a save of a running guest goes. */
struct precopy_stats {
    unsigned int iteration;      /* rounds done */
    unsigned long total_written; /* pages sent */
    long dirty_count;            /* pages left */
};

/* Every callback is called on the thread of the save or restore, with `data` as its last argument. */
struct save_callbacks {
    /* Have the guest suspend itself, and return when it has; 0 if it did not. Needed. */
    int (*suspend)(void *data);
    /* After each round: -1 give up, 0 go on, 1 stop the guest. A null pointer leaves it to pageferry's settings. */
    int (*precopy_policy)(struct precopy_stats stats, void *data);
    /* Not for plain streams. */
    int (*postcopy)(void *data);
    int (*checkpoint)(void *data);
    int (*wait_checkpoint)(void *data);
    /* Have the device model log the pages it writes, or stop; 0 if it does. Needed for live saves of HVM and PVH. */
    int (*switch_qemu_logdirty)(uint32_t domid, unsigned int enable, void *data);
    void *data;
};

struct restore_callbacks {
    /* The domain has its unchanging state; `missing` is 1 without a CPUID policy, 2 without one of MSRs, 3 without
     * both: make them up. 0 if that was done. May be a null pointer, as may the whole struct be. */
    int (*static_data_done)(unsigned int missing, void *data);
    /* Not for plain streams. */
    int (*suspend)(void *data);
    int (*postcopy)(void *data);
    int (*checkpoint)(void *data);
    int (*wait_checkpoint)(void *data);
    void (*restore_results)(unsigned long store_gfn, unsigned long console_gfn, void *data);
    void *data;
};

#endif /* XENGUEST_H */

/*
 * Saves domain `dom` into `io_fd`. The guest runs on where this fails before `suspend` was called; from then on it is
 * the caller's to resume. No log of written pages and no mapping is left behind. `recv_fd` is COLO's.
 */
int xc_domain_save(xc_interface *xch, int io_fd, uint32_t dom, uint32_t flags, struct save_callbacks *callbacks,
                   xc_stream_type_t stream_type, int recv_fd);

/*
 * Restores from `io_fd` into domain `dom`, which the caller has created without memory, and destroys if this fails. The
 * event channels and the domains that serve store and console go in; the frames of both come out. Nothing behind the
 * stream's end is read. `send_back_fd` is COLO's.
 */
int xc_domain_restore(xc_interface *xch, int io_fd, uint32_t dom, unsigned int store_evtchn, unsigned long *store_mfn,
                      uint32_t store_domid, unsigned int console_evtchn, unsigned long *console_mfn,
                      uint32_t console_domid, xc_stream_type_t stream_type, struct restore_callbacks *callbacks,
                      int send_back_fd);

#ifdef __cplusplus
}
#endif

#endif
