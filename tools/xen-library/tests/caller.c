/* A program that calls the two functions as its words say, and prints what came of it. */
#define _GNU_SOURCE
#ifdef WITH_XEN
#include <xenctrl.h>
#include <xenguest.h>
#endif
#include <pageferry_xen.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int suspended(void *data)
{
    puts("suspend");
    return data != NULL;
}

static int logged(uint32_t domid, unsigned int enable, void *data)
{
    printf("log %u %u\n", domid, enable);
    return data == NULL;
}

static int static_done(unsigned int missing, void *data)
{
    printf("static %u\n", missing);
    return data == NULL;
}

/* caller save|restore DOMAIN FD FLAGS STREAM_TYPE [log]: with `log` the interface is not a null pointer. */
int main(int argc, char **argv)
{
    static char something;
    struct save_callbacks save = { .suspend = suspended, .switch_qemu_logdirty = logged, .data = &something };
    struct restore_callbacks restore = { .static_data_done = static_done, .data = &something };
    unsigned long store = 5, console = 6;
    int result;

    if (argc < 6)
        return 2;
    xc_interface *xch = argc > 6 ? (xc_interface *)&something : NULL;
    uint32_t domain = strtoul(argv[2], NULL, 10), flags = strtoul(argv[4], NULL, 10);
    int fd = strcmp(argv[3], "null") ? atoi(argv[3]) : open("/dev/null", O_RDWR);
    xc_stream_type_t type = (xc_stream_type_t)atoi(argv[5]);

    errno = 0;
    if (!strcmp(argv[1], "save"))
        result = xc_domain_save(xch, fd, domain, flags, &save, type, -1);
    else if (!strcmp(argv[1], "save-without"))
        result = xc_domain_save(xch, fd, domain, flags, NULL, type, -1);
    else
        result = xc_domain_restore(xch, fd, domain, 1, &store, 0, 2, &console, 0, type, &restore, -1);
    int number = errno;
    printf("%d %s %lu %lu\n", result, number ? strerrorname_np(number) : "0", store, console);
    return 0;
}
