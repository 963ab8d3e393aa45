/* The Internet checksum (RFC 1071) over bytes in memory.
 *
 * Pure C, no dependency: it also compiles alone for other machines (tests/unit/test_c_portable.py).
 */
#ifndef UDPTUN_CHECKSUM_H
#define UDPTUN_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Ones'-complement sum of `len` bytes added to `sum`, unfolded, in memory order: fold it, and store the result as
 * it is (it is in network order already).  An odd last byte counts as if a zero followed. */
static inline uint64_t ut_sum(const void *data, size_t len, uint64_t sum)
{
    const unsigned char *p = (const unsigned char *)data;

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
