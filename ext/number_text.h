/* Numbers as text, for line protocol: integers, shortest floats, floats with fixed decimals.
 *
 * What is written last may be overwritten up to SLACK bytes behind its end.
 */
#ifndef WARDLINK_NUMBER_TEXT_H
#define WARDLINK_NUMBER_TEXT_H

#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace number_text {

enum { SLACK = 32, SIZE_MAX_OF_NUMBER = 24, DECIMALS_MAX = 9 };

const double POWERS[DECIMALS_MAX + 1] = {1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9};

/* Up to here, digits behind the point can be counted in halves without rounding. */
const double FIXED_END = 2251799813685248.0; /* 2^51 */

const uint64_t ZEROS = UINT64_C(0x3030303030303030); /* "00000000" */

/* Eight digits of a number below 10^8, the first one in the lowest byte. */
inline uint64_t eight_digits(uint32_t number)
{
    uint64_t fours = number / 10000 | (uint64_t)(number % 10000) << 32;
    uint64_t hundreds = (fours * 10486 >> 20) & UINT64_C(0x7f0000007f);
    uint64_t twos = hundreds | (fours - 100 * hundreds) << 16;
    uint64_t tens = (twos * 103 >> 10) & UINT64_C(0x000f000f000f000f);
    return tens | (twos - 10 * tens) << 8;
}

/* Eight characters, the first one in the lowest byte. */
inline void put_eight(char *to, uint64_t text)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    text = __builtin_bswap64(text);
#endif
    std::memcpy(to, &text, sizeof text);
}

inline char *put_standard(char *to, double value)
{
    return std::to_chars(to, to + SIZE_MAX_OF_NUMBER, value).ptr;
}

/* 10^k shifted up to 64 bits: exact, and its number of bits less one. */
struct Power {
    uint64_t shifted;
    int log2;
};
struct Powers {
    Power of[20] = {};
    constexpr Powers()
    {
        uint64_t power = 1;
        for (int k = 0; k < 20; k++) {
            int log2 = 63;
            while (!(power >> log2))
                log2--;
            of[k].shifted = power << (63 - log2);
            of[k].log2 = log2;
            power *= 10;
        }
    }
};
constexpr Powers TENS;

/* The upper 64 bits of a product of 128, its lowest one set where the lower 64 are not all zero. */
inline uint64_t round_to_odd(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)(product >> 64) | ((uint64_t)product != 0);
}

/* Shortest digits of c x 2^q, which is no power of two and no integer, 2^52 < c < 2^53, -61 <= q <= -3: the digits,
 * of which there are 15 to 17, and their power of ten. Schubfach (R. Giulietti, "The Schubfach way to render doubles",
 * 2020). In this range all powers of ten are exact, and half-way to its neighbours a value has more decimals than any
 * candidate: whether the ends of the interval belong to it does not matter. */
inline uint64_t shortest_digits(uint64_t c, int q, int *exponent)
{
    int k = q * 1262611 >> 22; /* floor(q x log10(2)) */
    Power power = TENS.of[-k];
    int shift = q + power.log2 + 1;
    uint64_t below = round_to_odd(power.shifted, (4 * c - 2) << shift);
    uint64_t middle = round_to_odd(power.shifted, 4 * c << shift);
    uint64_t above = round_to_odd(power.shifted, (4 * c + 2) << shift);
    uint64_t digits = middle / 4;
    uint64_t fewer = digits / 10;
    bool fewer_below = below <= 40 * fewer, fewer_above = 40 * fewer + 40 <= above;
    if (fewer_below != fewer_above) {
        *exponent = k + 1;
        return fewer + fewer_above;
    }
    *exponent = k;
    bool inside_below = below <= 4 * digits, inside_above = 4 * digits + 4 <= above;
    if (inside_below != inside_above)
        return digits + inside_above;
    uint64_t half = 4 * digits + 2;
    return digits + (middle > half || (middle == half && digits % 2));
}

/* What std::to_chars writes for a finite value: the fewest digits that read back the same, plain or with an exponent,
 * whichever is shorter. Written here for the values of signals, of which std::to_chars takes half of all the time. */
inline char *put_shortest(char *to, double value)
{
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint64_t mantissa = bits & ((UINT64_C(1) << 52) - 1);
    int q = (int)(bits >> 52 & 0x7ff) - 1075;
    uint64_t c = mantissa | UINT64_C(1) << 52;
    if (q < -61 || q > -3 || !mantissa || (q >= -52 && !(c & ((UINT64_C(1) << -q) - 1))))
        return put_standard(to, value);
    int exponent;
    uint64_t number = shortest_digits(c, q, &exponent);
    uint64_t front = number / 100000000;
    uint64_t high = eight_digits((uint32_t)(front % 100000000)), low = eight_digits((uint32_t)(number % 100000000));
    char text[64];
    text[0] = (char)('0' + front / 100000000);
    put_eight(text + 1, high | ZEROS);
    put_eight(text + 9, low | ZEROS);
    int first = 2 - (number >= UINT64_C(1000000000000000)) - (number >= UINT64_C(10000000000000000));
    int end = low ? 17 - __builtin_clzll(low) / 8 : high ? 9 - __builtin_clzll(high) / 8 : 1; /* no zeros at the end */
    int point = 17 + exponent; /* in text */
    to[0] = '-';
    to += value < 0;
    if (point > first) {
        std::memcpy(to, text + first, 16);
        to += point - first;
        to[0] = '.';
        std::memcpy(to + 1, text + point, 24);
        return to + 1 + end - point;
    }
    put_eight(to, UINT64_C(0x3030303030302e30)); /* 0.000000 */
    to += 2 + first - point;
    std::memcpy(to, text + first, 24);
    return to + end - first;
}

inline char *put_shortest(char *to, float value)
{
    return std::to_chars(to, to + SIZE_MAX_OF_NUMBER, value).ptr;
}

inline char *put_shortest(char *to, int64_t value)
{
    if (value >= INT64_C(10000000000000000)) { /* times in ns since 1970 */
        uint64_t number = (uint64_t)value;
        to = std::to_chars(to, to + SIZE_MAX_OF_NUMBER, (uint32_t)(number / UINT64_C(10000000000000000))).ptr;
        number %= UINT64_C(10000000000000000);
        put_eight(to, eight_digits((uint32_t)(number / 100000000)) | ZEROS);
        put_eight(to + 8, eight_digits((uint32_t)(number % 100000000)) | ZEROS);
        return to + 16;
    }
    return std::to_chars(to, to + SIZE_MAX_OF_NUMBER, value).ptr;
}

/* |value| x 10^decimals, rounded to the nearest integer, exact ties to even, as printf does. Must be below FIXED_END. */
inline uint64_t scaled(double magnitude, int decimals)
{
    double product = magnitude * POWERS[decimals];
    int64_t whole = std::llrint(product);
    double rest = product - (double)whole;
    if (__builtin_expect(std::fabs(rest) == 0.5, 0)) {
        /* The product itself was rounded: what was cut off decides. */
        double cut = std::fma(magnitude, POWERS[decimals], -product);
        whole += (rest > 0 && cut > 0) - (rest < 0 && cut < 0);
    }
    return (uint64_t)whole;
}

/* What put_fixed leaves: no decimals or more than seven, eight digits before the point or more. */
__attribute__((noinline)) inline char *put_other_fixed(char *to, double value, int decimals)
{
    double magnitude = std::fabs(value);
    if (!(magnitude * POWERS[decimals] < FIXED_END))
        return put_shortest(to, value);
    uint64_t number = scaled(magnitude, decimals), power = (uint64_t)POWERS[decimals];
    to[0] = '-';
    to += std::signbit(value) & (number != 0);
    to = std::to_chars(to, to + SIZE_MAX_OF_NUMBER, number / power).ptr;
    if (decimals) {
        uint64_t rest = number % power;
        to[0] = '.';
        for (int k = decimals; k > 0; k--, rest /= 10)
            to[k] = (char)('0' + rest % 10);
        to += 1 + decimals;
    }
    return to;
}

/* A finite value; shortest form where it is too large for FIXED_END. */
inline char *put_fixed(char *to, double value, int decimals)
{
    const double end = 99999999; /* all digits in one word of eight */
    double magnitude = std::fabs(value);
    if (__builtin_expect(!(magnitude * POWERS[decimals] < end) || decimals == 0 || decimals > 7, 0))
        return put_other_fixed(to, value, decimals);
    uint64_t number = scaled(magnitude, decimals);
    to[0] = '-';
    to += std::signbit(value) & (number != 0);
    uint64_t digits = eight_digits((uint32_t)number);
    int before_point = 8 - decimals;
    /* A digit that must stand ends the search for zeros at the front. */
    int zeros = __builtin_ctzll(digits | UINT64_C(1) << 8 * (before_point - 1)) / 8;
    digits |= ZEROS;
    put_eight(to, digits >> 8 * zeros);
    to += before_point - zeros;
    to[0] = '.';
    put_eight(to + 1, digits >> 8 * before_point);
    return to + 1 + decimals;
}

} // namespace number_text

#endif
