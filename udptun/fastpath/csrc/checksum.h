/* The Internet checksum (RFC 1071) over bytes in memory.
 *
 * Pure C, no dependency: it also compiles alone for other machines (tests/unit/test_fastpath_build.py).
 */
#ifndef UDPTUN_CHECKSUM_H
#define UDPTUN_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t ut_lanes __attribute__((vector_size(16)));

/* Sum of `blocks` times 64 bytes as 32-bit words.  The two words of each 64-bit lane are summed apart, the lower ones by
 * a mask and the upper ones by a shift.  Compilers keep the four sums in registers wherever this is inlined; a loop over
 * sixteen lanes in an array was a quarter as fast where they did not.  What every x86-64 and arm64 has is enough: SSE2
 * reaches the speed of memory here. */
static inline uint64_t ut_sum_blocks(const unsigned char *p, size_t blocks)
{
    const ut_lanes lower_word = {0xffffffffu, 0xffffffffu};
    ut_lanes lower[2] = {{0}, {0}}, upper[2] = {{0}, {0}};

    for (; blocks; p += 64, blocks--) {
        ut_lanes word[4];
        memcpy(word, p, 64);
        lower[0] += word[0] & lower_word;
        upper[0] += word[0] >> 32;
        lower[1] += word[1] & lower_word;
        upper[1] += word[1] >> 32;
        lower[0] += word[2] & lower_word;
        upper[0] += word[2] >> 32;
        lower[1] += word[3] & lower_word;
        upper[1] += word[3] >> 32;
    }
    ut_lanes sum = lower[0] + lower[1] + upper[0] + upper[1];
    return sum[0] + sum[1];
}

/* Ones'-complement sum of `len` bytes added to `sum`, unfolded, in memory order: fold it, and store the result as
 * it is (it is in network order already).  An odd last byte counts as if a zero followed. */
static inline uint64_t ut_sum(const void *data, size_t len, uint64_t sum)
{
    const unsigned char *p = (const unsigned char *)data;

    if (len >= 64) {
        sum += ut_sum_blocks(p, len / 64);
        p += len & ~(size_t)63;
        len &= 63;
    }
    for (; len >= 4; p += 4, len -= 4) {
        uint32_t word;
        memcpy(&word, p, 4);
        sum += word;
    }
    if (len >= 2) {
        uint16_t half;
        memcpy(&half, p, 2);
        sum += half;
        p += 2;
        len -= 2;
    }
    if (len) {
        unsigned char last[2] = {*p, 0};
        uint16_t half;
        memcpy(&half, last, 2);
        sum += half;
    }
    return sum;
}

/* Fold a sum of 16-bit quantities to 16 bits with end-around carry. */
static inline uint16_t ut_fold(uint64_t sum)
{
    sum = (sum & 0xffffffffu) + (sum >> 32);
    sum = (sum & 0xffffffffu) + (sum >> 32);
    sum = (sum & 0xffffu) + (sum >> 16);
    sum = (sum & 0xffffu) + (sum >> 16);
    return (uint16_t)sum;
}

#endif
