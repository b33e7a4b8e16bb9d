/* Sixteen lanes of floats in two AVX2 registers. What each operation does is the same as in avx512.h, bit for bit. */

#define VARIANT(name) name##_avx2
#define FOR_VARIANT __attribute__((target("avx2,fma")))
#define HERE static inline __attribute__((always_inline, target("avx2,fma")))
/* Most rows, and most blocks of sixteen columns, of a tile of results that stays in registers. */
#define TILE_ROWS 3
#define TILE_BLOCKS 2

typedef struct {
    __m256 a, b;
} VARIANT(lanes);
#define LANES VARIANT(lanes)
#define EACH(made_a, made_b) ((LANES){made_a, made_b})

static const int32_t first_of_avx2[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
/* The mask of the first `count` lanes, from lane `from` on. */
HERE __m256i VARIANT(mask)(int count, int from) {
    return _mm256_loadu_si256((const __m256i *)(first_of_avx2 + 16 - count + from));
}

HERE LANES VARIANT(load)(const float *from) { return EACH(_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)); }
HERE LANES VARIANT(load_some)(const float *from, int count) {
    return EACH(_mm256_maskload_ps(from, VARIANT(mask)(count, 0)),
                _mm256_maskload_ps(from + 8, VARIANT(mask)(count, 8)));
}
HERE void VARIANT(store)(float *to, LANES x) {
    _mm256_storeu_ps(to, x.a);
    _mm256_storeu_ps(to + 8, x.b);
}
HERE void VARIANT(store_some)(float *to, int count, LANES x) {
    _mm256_maskstore_ps(to, VARIANT(mask)(count, 0), x.a);
    _mm256_maskstore_ps(to + 8, VARIANT(mask)(count, 8), x.b);
}
HERE LANES VARIANT(all)(float x) { return EACH(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
HERE LANES VARIANT(add)(LANES x, LANES y) { return EACH(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
HERE LANES VARIANT(subtract)(LANES x, LANES y) { return EACH(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
HERE LANES VARIANT(times)(LANES x, LANES y) { return EACH(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
HERE LANES VARIANT(over)(LANES x, LANES y) { return EACH(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
/* x * y + z, rounded once. */
HERE LANES VARIANT(fused)(LANES x, LANES y, LANES z) {
    return EACH(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
/* The larger and the smaller; y where either is not a number. */
HERE LANES VARIANT(larger)(LANES x, LANES y) { return EACH(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
HERE LANES VARIANT(smaller)(LANES x, LANES y) { return EACH(_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
/* yes where x <= limit, else no (where x is not a number, too). */
HERE LANES VARIANT(at_most)(LANES x, LANES limit, LANES yes, LANES no) {
    return EACH(_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, limit.a, _CMP_LE_OQ)),
                _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, limit.b, _CMP_LE_OQ)));
}
/* x with the sign of y. */
HERE LANES VARIANT(with_sign)(LANES x, LANES y) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return EACH(_mm256_or_ps(_mm256_andnot_ps(sign, x.a), _mm256_and_ps(sign, y.a)),
                _mm256_or_ps(_mm256_andnot_ps(sign, x.b), _mm256_and_ps(sign, y.b)));
}
HERE LANES VARIANT(rounded)(LANES x) {
    return EACH(_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* 2^x for whole x from -126 to 127. */
HERE LANES VARIANT(power_of_two)(LANES x) {
    __m256i bias = _mm256_set1_epi32(127);
    __m256i a = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x.a), bias), 23);
    __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x.b), bias), 23);
    return EACH(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
}
HERE float VARIANT(sum)(LANES x) {
    __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
