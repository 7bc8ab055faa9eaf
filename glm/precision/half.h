/* Half formats: rounding to one, to its 16 bits and back; and the e^x of all parts of the kernel. */

/* Formats of inputs and of what the kernel keeps. */
enum { FP32, FP16, BF16 };

/* Rounds to the nearest number of a half format, ties to even; NaN stays. */
INLINE float rounded(float x, int kind) {
    if (kind == FP32) return x;
    uint32_t bits = bits_of(x), drop = kind == BF16 ? 16 : 13;
    float near = of_bits((bits + (1u << (drop - 1)) - 1 + (bits >> drop & 1)) >> drop << drop);
    if (kind == FP16) {
        /* Below 2^-14 fp16's numbers are 2^-24 apart, as fp32's are in [.5, 1). */
        float size = of_bits(bits & 0x7fffffff), small = (size + 0.5f) - 0.5f;
        uint32_t sign = bits & 0x80000000;
        near = size < 6.103515625e-05f ? of_bits(bits_of(small) | sign) : near;
        near = of_bits(bits_of(near) & 0x7fffffff) >= 65536.0f ? of_bits(0x7f800000 | sign) : near;
    }
    return x != x ? x : near;
}

/* The 16 bits of a number that is already rounded. */
INLINE uint16_t code_of(float x, int kind) {
    uint32_t bits = bits_of(x), size = bits & 0x7fffffff;
    if (kind == BF16) return (uint16_t)(bits >> 16 | (x != x ? 0x40 : 0));
    uint32_t small = (uint32_t)(int32_t)(of_bits(size < 0x38800000 ? size : 0) * 16777216.0f);
    uint32_t code = size < 0x38800000 ? small : (size >> 13) - (112u << 10);
    code = size >= 0x7f800000 ? 0x7c00u | (size > 0x7f800000 ? 0x200u : 0) : code;
    return (uint16_t)(code | (bits >> 16 & 0x8000));
}

INLINE float of_code(uint16_t code, int kind) {
    if (kind == BF16) return of_bits((uint32_t)code << 16);
    uint32_t size = code & 0x7fff, sign = (uint32_t)(code & 0x8000) << 16;
    uint32_t bits = (size << 13) + (112u << 23);
    bits = size < 0x400 ? bits_of((float)(int32_t)size * 5.9604644775390625e-08f) : bits;
    bits = size >= 0x7c00 ? size << 13 | 0x7f800000 : bits;
    return of_bits(bits | sign);
}

/* exp(x) for x <= 0, within 2 ulp; 0 below -87, NaN for NaN: 2^n e^r, |r| <= log(2) / 2, e^r by Cephes' polynomial (expf). */
INLINE float exp_below(float x) {
    float at = x < -87.0f ? -87.0f : x;
    float n = at * 1.44269504f + 12582912.0f; /* near 1.5 2^23 floats are 1 apart: the sum rounds to an integer */
    int32_t bits;
    memcpy(&bits, &n, 4);
    n -= 12582912.0f;
    float r = at - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    bits = (int32_t)((uint32_t)(bits + 127) << 23);
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}
