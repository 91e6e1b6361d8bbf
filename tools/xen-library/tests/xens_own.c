/* Stands where libxenguest and libxenctrl stand under Xen's own save helper: the functions there, and a log. */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

int xc_domain_save(void *xch, int io_fd, uint32_t dom, uint32_t flags, void *callbacks, unsigned type, int recv_fd)
{
    printf("theirs: save %u of type %u\n", dom, type);
    return 0;
}

int xc_domain_restore(void *xch, int io_fd, uint32_t dom, unsigned store_evtchn, unsigned long *store_mfn,
                      uint32_t store_domid, unsigned console_evtchn, unsigned long *console_mfn,
                      uint32_t console_domid, unsigned type, void *callbacks, int send_back_fd)
{
    printf("theirs: restore %u of type %u, ports %u %u, back %d\n", dom, type, store_evtchn, console_evtchn,
           send_back_fd);
    *store_mfn = 77;
    return 0;
}

void xc_report_error(void *xch, int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("logged %d: ", code);
    vprintf(format, arguments);
    puts("");
    va_end(arguments);
}
