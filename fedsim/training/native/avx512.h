/* Sixteen lanes of floats in one AVX-512 register. What each operation does is the same as in avx2.h, bit for bit. */

#define VARIANT(name) name##_avx512
#define FOR_VARIANT __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma")))
#define HERE static inline __attribute__((always_inline, target("avx512f,avx512dq,avx512vl,avx2,fma")))
/* Most rows, and most blocks of sixteen columns, of a tile of results that stays in registers. */
#define TILE_ROWS 5
#define TILE_BLOCKS 5

typedef __m512 VARIANT(lanes);
#define LANES VARIANT(lanes)

HERE LANES VARIANT(load)(const float *from) { return _mm512_loadu_ps(from); }
HERE LANES VARIANT(load_some)(const float *from, int count) {
    return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
}
HERE void VARIANT(store)(float *to, LANES a) { _mm512_storeu_ps(to, a); }
HERE void VARIANT(store_some)(float *to, int count, LANES a) {
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), a);
}
HERE LANES VARIANT(all)(float a) { return _mm512_set1_ps(a); }
HERE LANES VARIANT(add)(LANES a, LANES b) { return _mm512_add_ps(a, b); }
HERE LANES VARIANT(subtract)(LANES a, LANES b) { return _mm512_sub_ps(a, b); }
HERE LANES VARIANT(times)(LANES a, LANES b) { return _mm512_mul_ps(a, b); }
HERE LANES VARIANT(over)(LANES a, LANES b) { return _mm512_div_ps(a, b); }
/* a * b + c, rounded once. */
HERE LANES VARIANT(fused)(LANES a, LANES b, LANES c) { return _mm512_fmadd_ps(a, b, c); }
/* The larger and the smaller; b where either is not a number. */
HERE LANES VARIANT(larger)(LANES a, LANES b) { return _mm512_max_ps(a, b); }
HERE LANES VARIANT(smaller)(LANES a, LANES b) { return _mm512_min_ps(a, b); }
/* yes where a <= limit, else no (where a is not a number, too). */
HERE LANES VARIANT(at_most)(LANES a, LANES limit, LANES yes, LANES no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, limit, _CMP_LE_OQ), no, yes);
}
/* a with the sign of b. */
HERE LANES VARIANT(with_sign)(LANES a, LANES b) {
    LANES sign = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(sign, a), _mm512_and_ps(sign, b));
}
HERE LANES VARIANT(rounded)(LANES a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* 2^a for whole a from -126 to 127. */
HERE LANES VARIANT(power_of_two)(LANES a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127)), 23));
}
HERE float VARIANT(sum)(LANES a) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
