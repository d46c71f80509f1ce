/* exp, tanh and rounding on vectors, and loads of a few numbers. Include lora_dot.h first. A NaN stays one. */
#ifndef LORAMUX_FUNCTIONS
#define LORAMUX_FUNCTIONS

INLINE vec pick(bits where, vec yes, vec no) { return (vec)((where & (bits)yes) | (~where & (bits)no)); }
INLINE vec all(float f) { return (vec){0} + f; }

INLINE vec poly_of_exp(vec r) {
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
}

/* e^x for x <= 88, within 2 units in the last place; 0 for what is far below. */
INLINE vec exp_of(vec x) {
#if defined(__AVX512F__)
    vec low = (vec)_mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x); /* in this order a NaN stays one */
    vec n = (vec)_mm512_roundscale_ps((__m512)(low * 1.44269504f), 8);
    vec r = low - n * 0.693359375f + n * 2.12194440e-4f;
    return (vec)_mm512_scalef_ps((__m512)poly_of_exp(r), (__m512)n);
#else
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, left in the low bits */
    vec low = pick((bits)(x < -87.3f), all(-87.3f), x);
    vec shifted = low * 1.44269504f + magic, n = shifted - magic;
    vec r = low - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = poly_of_exp(r) * (vec)(((bits)shifted << 23) + 0x3f800000u);
    return pick((bits)(x < -87.3f), all(0.0f), y);
#endif
}

#if defined(__AVX512F__)
/* 2^x within 3e-6 of it: more than bf16 keeps. Not for infinities. */
INLINE __m512 exp2_of(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, 8), f = _mm512_sub_ps(x, n), p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}
#endif

/* x / (1 + e^-z). Of bf16 numbers, within 4e-6 of it: more than bf16 keeps. */
INLINE vec times_sigmoid(vec x, vec z, int type) {
#if defined(__AVX512F__)
    if (type == BF16) { /* beyond 100, either way, it is as good as 1 or 0; in this order a NaN stays one */
        __m512 y = _mm512_mul_ps((__m512)z, _mm512_set1_ps(-1.44269504f));
        y = _mm512_min_ps(_mm512_set1_ps(100.0f), _mm512_max_ps(_mm512_set1_ps(-100.0f), y));
        __m512 below = _mm512_add_ps(exp2_of(y), _mm512_set1_ps(1.0f)), r = _mm512_rcp14_ps(below);
        r = _mm512_mul_ps(r, _mm512_fnmadd_ps(below, r, _mm512_set1_ps(2.0f)));
        return x * (vec)r;
    }
#endif
    (void)type;
    vec size = pick((bits)(z < -88.0f), all(88.0f), -z); /* e^88 is all that fits */
    return x / (1.0f + exp_of(size));
}

INLINE vec tanh_of(vec x) {
    vec size = pick((bits)(x < 0.0f), -x, x), capped = pick((bits)(size > 20.0f), all(20.0f), size);
    vec far = 1.0f - 2.0f / (exp_of(2.0f * capped) + 1.0f), s = x * x;
    vec near = size + size * s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835))));
    vec y = pick((bits)(size < 0.25f), near, far);
    return pick((bits)(x < 0.0f), -y, y);
}

/* To nearest even. The instruction takes what is below 1e-38 for zero. */
INLINE halves narrow(vec v) {
#if defined(__AVX512BF16__)
    return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
    return round_bf16(v);
#endif
}

INLINE vec wide(halves h) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
    return (vec)(__builtin_convertvector(h, bits) << 16);
#endif
}

/* The value as it would be in the type. A product of fp32 is rounded, too, before it is added to another: no fused
 * multiply-add across this. */
INLINE vec to_type(vec v, int type) {
    if (type == BF16) return wide(narrow(v));
#if defined(__x86_64__)
    __asm__("" : "+x"(v));
#endif
    return v;
}

/* The first `count` numbers, zeros after them; LANES of them where `whole`, a constant, says so. */
INLINE vec load_part(const char *p, int type, int64_t count, const int whole) {
    halves h = {0};
    vec v = {0};
    if (type == BF16) {
        memcpy(&h, p, whole ? (int64_t)sizeof h : 2 * count);
        return wide(h);
    }
    memcpy(&v, p, whole ? (int64_t)sizeof v : 4 * count);
    return v;
}

INLINE void store_part(char *p, int type, int64_t count, const int whole, vec v) {
    if (type == BF16) {
        halves h = narrow(v);
        memcpy(p, &h, whole ? (int64_t)sizeof h : 2 * count);
    } else
        memcpy(p, &v, whole ? (int64_t)sizeof v : 4 * count);
}

/* For every LANES numbers of `width`, whole ones first: the code given may use i, left and the constant `whole`. */
#define EACH_PART(width, ...)                                                                   \
    {                                                                                           \
        int64_t i = 0, left = LANES;                                                            \
        for (const int whole = 1; i + LANES <= (width); i += LANES) __VA_ARGS__                        \
        left = (width) - i;                                                                     \
        if (left > 0) { const int whole = 0; __VA_ARGS__ }                                             \
    }
#endif
