/* Values of 24 and 12 bits to int32, 16 bytes at a time, in GCC's vector extensions.
 *
 * A shuffle of bytes is one instruction on aarch64 and, from SSSE3 on, on x86-64: every x86-64 since 2006, but not
 * promised by its baseline, so it is looked for once at run time. Everywhere else plain loops do the same.
 */
#ifndef WARDLINK_PACKET_BITS_H
#define WARDLINK_PACKET_BITS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { CYTON_BYTES = 33, CYTON_CHANNELS = 8, MUSE_BYTES = 20, MUSE_SAMPLES = 12 };

/* Eight bytes, most significant first; the compiler makes a single load of it. */
static inline uint64_t big_endian(const uint8_t *at)
{
    return (uint64_t)at[0] << 56 | (uint64_t)at[1] << 48 | (uint64_t)at[2] << 40 | (uint64_t)at[3] << 32 |
           (uint64_t)at[4] << 24 | (uint64_t)at[5] << 16 | (uint64_t)at[6] << 8 | (uint64_t)at[7];
}

static inline const uint8_t *packet_at(const uint8_t *data, const int32_t *starts, ptrdiff_t k)
{
    return data + (starts ? starts[k] : k * CYTON_BYTES);
}

/* Counts of channel c, packet k at counts[c * by_channel + k * by_packet]. `starts` NULL: packets side by side. */
static inline void cyton_plain(const uint8_t *data, const int32_t *starts, ptrdiff_t first, ptrdiff_t count,
                               int32_t *counts, ptrdiff_t by_channel, ptrdiff_t by_packet)
{
    for (ptrdiff_t k = first; k < count; k++) {
        const uint8_t *packet = packet_at(data, starts, k);
        int32_t *value = counts + k * by_packet;
        for (int pair = 0; pair < CYTON_CHANNELS / 2; pair++, value += 2 * by_channel) {
            /* Two bytes of something else, then two values. */
            uint64_t word = big_endian(packet + 6 * pair);
            value[0] = (int32_t)((int64_t)(word << 16) >> 40);
            value[by_channel] = (int32_t)((int64_t)(word << 40) >> 40);
        }
    }
}

static inline void muse_plain(const uint8_t *packets, ptrdiff_t count, int32_t *counts)
{
    for (ptrdiff_t k = 0; k < 3 * count; k++) {
        /* Two bytes of something else, then four values; to subtract the middle is to flip the highest bit. */
        uint64_t word = big_endian(packets + MUSE_BYTES * (k / 3) + 6 * (k % 3)) ^ UINT64_C(0x800800800800);
        for (int value = 0; value < 4; value++)
            counts[4 * k + value] = (int32_t)((int64_t)(word << (16 + 12 * value)) >> 52);
    }
}

#if defined(__GNUC__) && !defined(__clang__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && \
    (defined(__x86_64__) || defined(__aarch64__))
#define PACKET_BITS_VECTORS 1

#ifdef __x86_64__
#define PACKET_BITS_TARGET __attribute__((target("ssse3")))
#define PACKET_BITS_AVAILABLE() __builtin_cpu_supports("ssse3")
#else
#define PACKET_BITS_TARGET
#define PACKET_BITS_AVAILABLE() 1
#endif

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef int64_t i64x2 __attribute__((vector_size(16)));

/* Bytes 3k, 3k+1, 3k+2 of a group become the three upper bytes of lane k, most significant on top. */
#define LANES_OF_24(at) \
    {at, at + 2, at + 1, at, at, at + 5, at + 4, at + 3, at, at + 8, at + 7, at + 6, at, at + 11, at + 10, at + 9}
/* The two bytes with a value of 12 bits become the upper ones of its lane; in odd lanes it has 4 bits before it. */
#define LANES_OF_12(at) \
    {at, at, at + 1, at, at, at, at + 2, at + 1, at, at, at + 4, at + 3, at, at, at + 5, at + 4}

PACKET_BITS_TARGET static inline i32x4 four_of_24(const uint8_t *at, u8x16 lanes)
{
    u8x16 bytes;
    memcpy(&bytes, at, sizeof bytes);
    return (i32x4)__builtin_shuffle(bytes, lanes) >> 8;
}

PACKET_BITS_TARGET static void cyton_vectors(const uint8_t *data, const int32_t *starts, ptrdiff_t count,
                                             int32_t *counts, ptrdiff_t by_channel, ptrdiff_t by_packet)
{
    const u8x16 front = LANES_OF_24(0), back = LANES_OF_24(4);
    ptrdiff_t k = 0;
    if (by_channel == 1) {
        for (; k < count; k++) {
            const uint8_t *packet = packet_at(data, starts, k);
            i32x4 low = four_of_24(packet + 2, front), high = four_of_24(packet + 10, back);
            memcpy(counts + k * by_packet, &low, sizeof low);
            memcpy(counts + k * by_packet + 4, &high, sizeof high);
        }
        return;
    }
    for (; k + 4 <= count; k += 4) {
        for (int half = 0; half < 2; half++) {
            i32x4 row[4];
            for (int next = 0; next < 4; next++)
                row[next] = four_of_24(packet_at(data, starts, k + next) + (half ? 10 : 2), half ? back : front);
            const i32x4 zip_low = {0, 4, 1, 5}, zip_high = {2, 6, 3, 7};
            const i64x2 first = {0, 2}, second = {1, 3};
            i64x2 a = (i64x2)__builtin_shuffle(row[0], row[1], zip_low);
            i64x2 b = (i64x2)__builtin_shuffle(row[2], row[3], zip_low);
            i64x2 c = (i64x2)__builtin_shuffle(row[0], row[1], zip_high);
            i64x2 d = (i64x2)__builtin_shuffle(row[2], row[3], zip_high);
            i64x2 column[4] = {__builtin_shuffle(a, b, first), __builtin_shuffle(a, b, second),
                               __builtin_shuffle(c, d, first), __builtin_shuffle(c, d, second)};
            for (int channel = 0; channel < 4; channel++)
                memcpy(counts + (4 * half + channel) * by_channel + k, &column[channel], sizeof column[channel]);
        }
    }
    cyton_plain(data, starts, k, count, counts, by_channel, by_packet);
}

PACKET_BITS_TARGET static inline void store_four_of_12(u8x16 bytes, u8x16 lanes, int32_t *counts)
{
    /* Drops the 4 bits before the value in odd lanes. What comes behind a value goes with the last shift. */
    const u16x8 shift = {1, 1, 1, 16, 1, 1, 1, 16};
    const u32x4 sign = {0x80000000u, 0x80000000u, 0x80000000u, 0x80000000u};
    u16x8 raised = (u16x8)__builtin_shuffle(bytes, lanes) * shift;
    i32x4 values = (i32x4)((u32x4)raised ^ sign) >> 20;
    memcpy(counts, &values, sizeof values);
}

PACKET_BITS_TARGET static void muse_vectors(const uint8_t *packets, ptrdiff_t count, int32_t *counts)
{
    const u8x16 first = LANES_OF_12(0), second = LANES_OF_12(6), third = LANES_OF_12(10);
    for (ptrdiff_t k = 0; k < count; k++) {
        u8x16 front, back;
        memcpy(&front, packets + MUSE_BYTES * k + 2, sizeof front);
        memcpy(&back, packets + MUSE_BYTES * k + 4, sizeof back);
        store_four_of_12(front, first, counts + MUSE_SAMPLES * k);
        store_four_of_12(front, second, counts + MUSE_SAMPLES * k + 4);
        store_four_of_12(back, third, counts + MUSE_SAMPLES * k + 8);
    }
}
#endif

static void cyton_counts(const uint8_t *data, const int32_t *starts, ptrdiff_t count, int32_t *counts,
                         ptrdiff_t by_channel, ptrdiff_t by_packet)
{
#ifdef PACKET_BITS_VECTORS
    if (PACKET_BITS_AVAILABLE()) {
        cyton_vectors(data, starts, count, counts, by_channel, by_packet);
        return;
    }
#endif
    cyton_plain(data, starts, 0, count, counts, by_channel, by_packet);
}

static void muse_counts_of(const uint8_t *packets, ptrdiff_t count, int32_t *counts)
{
#ifdef PACKET_BITS_VECTORS
    if (PACKET_BITS_AVAILABLE()) {
        muse_vectors(packets, count, counts);
        return;
    }
#endif
    muse_plain(packets, count, counts);
}

#endif
