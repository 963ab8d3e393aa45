/* Nanoseconds per call of the datapath's checksum over blocks in the first-level cache.
 *
 *     checksum CALLS BYTES…      prints a line "BYTES NANOSECONDS CHECK" for each size
 *
 * CHECK is the folded sum, for the caller to compare with its own.
 */
#include "../../udptun/fastpath/csrc/checksum.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

int main(int argc, char **argv)
{
    static unsigned char data[1 << 16];
    long calls = argc > 1 ? atol(argv[1]) : 0;

    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (unsigned char)(i * 7 + 3);
    for (int i = 2; i < argc; i++) {
        size_t bytes = strtoul(argv[i], NULL, 10);
        uint16_t sum = 0;
        double start = now_ns();

        if (bytes > sizeof data)
            return 2;
        for (long call = 0; call < calls; call++) {
            sum = ut_fold(ut_sum(data, bytes, 0));
            /* Without this the compiler would take the call out of the loop. */
            __asm__ volatile("" : : "r"(sum), "r"(data) : "memory");
        }
        printf("%zu %.3f %u\n", bytes, (now_ns() - start) / (double)calls, sum);
    }
    return 0;
}
