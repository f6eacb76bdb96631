// The kernels' functions against sums in double, on shapes drawn at random: `check SEED COUNT`. For processors under emulation,
// and for compilers' sanitizers, where Python is not. Prints what differs; the exit status says whether anything does.

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>

#include "attention.h"
#include "tails.h"
#include "two_bits.h"
#include "weights.h"

extern "C" {
void linear_blocked(const bf16*, const uint32_t*, const bf16*, bf16*, int64_t, int64_t, int64_t);
void linear_plain(const bf16*, const bf16*, const bf16*, bf16*, int64_t, int64_t, int64_t);
void linear_int8(const bf16*, const int8_t*, const float*, const bf16*, bf16*, int64_t, int64_t, int64_t);
void linear_int4(const bf16*, const uint8_t*, const uint16_t*, const uint16_t*, const bf16*, bf16*, int64_t, int64_t, int64_t,
                 int64_t);
void rms_norm(const bf16*, const bf16*, bf16*, int64_t, int64_t, float, float);
void attend(const bf16*, const bf16*, const bf16*, const Vectors*, const int64_t*, int64_t, const bf16*, const bf16*, bf16*,
            int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const int64_t*, float, float);
void attend_causally(const bf16*, const bf16*, const bf16*, const bf16*, bf16*, int64_t, int64_t, int64_t, int64_t, int64_t,
                     int64_t, int64_t, const int64_t*, float, float);
void attend_rows(const void*, const void*, const void*, void*, float*, int64_t, int64_t, int64_t, int64_t, const int64_t*,
                 const int64_t*, const int64_t*, float, int);
void attend_rows_backward(const void*, const void*, const void*, const void*, const void*, const float*, void*, float*, void*, void*,
                          int64_t, int64_t, int64_t, int64_t, const int64_t*, const int64_t*, const int64_t*, float, int);
void run_tails(const ScoredCache*, const int64_t*, const bf16*, const bf16*, const bf16*, const int64_t*, const int64_t*,
               const int64_t*, const int64_t*, const TailStep*, bf16*, int32_t*);
void run_looks(const Look*, int64_t);
void find_likeliest(const bf16*, int64_t*, int64_t, int64_t);
void use_encoded_split(void (*)(const SplitQueries&, const Vectors&, const Vectors&, const Vectors&));
void attend_encoded_split(const SplitQueries&, const Vectors&, const Vectors&, const Vectors&);
void multiply_matrices(const bf16*, const bf16*, const bf16*, bf16*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                       int);
}

using Numbers64 = std::vector<double>;

static std::mt19937 source;
static int failures = 0;

static int64_t draw(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(source); }
static float normal() { return std::normal_distribution<float>()(source); }

static std::vector<bf16> numbers(int64_t n) {
    std::vector<bf16> x(n);
    for (auto& value : x) value = narrow(normal());
    return x;
}

static uint16_t half(float x) {  // of a normal number, cut off
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13);
}

// `tolerance` of the largest number, besides the rounding of each, and of what it is a sum of: `rounding`, where that is given
static void compare(const char* what, const std::vector<bf16>& found, const Numbers64& expected, double tolerance,
                    const Numbers64& rounding = {}) {
    double most = 0, worst = 0;
    for (double x : expected) most = std::max(most, std::fabs(x));
    for (size_t i = 0; i < found.size(); i++) {
        const double own = std::fabs(expected[i]) / 256 + (rounding.empty() ? 0 : rounding[i]);
        const double error = std::fabs(double(widen(found[i])) - expected[i]) - own;
        worst = std::isfinite(error) ? std::max(worst, error) : INFINITY;
    }
    if (worst > tolerance * most) failures++, std::printf("%s: differs by %g of at most %g\n", what, worst, most);
}

static void check_products() {
    const int64_t M = draw(1, 9), N = draw(1, 150), K = 32 * draw(1, 12) - 8 * draw(0, 3), whole = K / 32 * 32;
    const auto x = numbers(M * K), w = numbers(N * K), bias = numbers(N);
    const bf16* added = draw(0, 1) ? bias.data() : nullptr;
    std::vector<bf16> y(M * N);
    const auto expected = [&](int64_t inputs, auto weight, const bf16* bias) {
        Numbers64 sums(M * N);
        for (int64_t m = 0; m < M; m++)
            for (int64_t n = 0; n < N; n++) {
                double sum = bias ? widen(bias[n]) : 0;
                for (int64_t k = 0; k < inputs; k++) sum += double(widen(x[m * inputs + k])) * weight(n, k);
                sums[m * N + n] = sum;
            }
        return sums;
    };
    const auto plain = [&](int64_t n, int64_t k) { return double(widen(w[n * K + k])); };
    linear_plain(x.data(), w.data(), added, y.data(), M, K, N);
    compare("linear_plain", y, expected(K, plain, added), 1e-4);

    const int64_t pairs = (K + 31) / 32 * 16, blocks = (N + 63) / 64;
    std::vector<uint32_t> blocked(blocks * pairs * 64);
    for (int64_t n = 0; n < N; n++)
        for (int64_t k = 0; k < K; k++)
            blocked[(n / 64 * pairs + k / 2) * 64 + n % 64] |= uint32_t(w[n * K + k]) << 16 * (k % 2);
    linear_blocked(x.data(), blocked.data(), added, y.data(), M, K, N);
    compare("linear_blocked", y, expected(K, plain, added), 1e-4);

    std::vector<int8_t> integers(N * K);
    std::vector<float> scale(N);
    for (auto& i : integers) i = int8_t(draw(-127, 127));
    for (auto& s : scale) s = 0.01f * std::fabs(normal());
    const auto in_8_bits = [&](int64_t n, int64_t k) { return double(integers[n * K + k]) * scale[n]; };
    linear_int8(x.data(), integers.data(), scale.data(), added, y.data(), M, K, N);
    compare("linear_int8", y, expected(K, in_8_bits, added), 1e-4);

    const int64_t group = whole % 128 == 0 ? 128 : whole % 64 == 0 ? 64 : 32, groups = whole / group;
    if (!whole) return;
    std::vector<uint8_t> nibbles(N * whole / 2);
    std::vector<uint16_t> scales(N * groups), minima(N * groups);
    for (auto& i : nibbles) i = uint8_t(draw(0, 255));
    for (auto& s : scales) s = half(0.05f + 0.1f * std::fabs(normal()));
    for (auto& s : minima) s = half(-0.5f - std::fabs(normal()));
    const auto in_4_bits = [&](int64_t n, int64_t k) {
        const int64_t at = n * groups + k / group;
        const int i = nibbles[(n * whole + k) / 2] >> k % 2 * 4 & 15;
        return double(from_half(scales[at])) * i + from_half(minima[at]);
    };
    const Weight int4{INT4_PAIRS, whole, N, group, nibbles.data(), scales.data(), minima.data(), added};
    linear_int4(x.data(), nibbles.data(), scales.data(), minima.data(), added, y.data(), M, whole, N, group);
    compare("linear_int4", y, expected(whole, in_4_bits, added), 2e-4);

    // tiles for many rows: widened to bfloat16 first, which holds 8 bits exactly and rounds others by up to 1 / 512
    const Weight int8{INT8_ROWS, K, N, 0, integers.data(), scale.data(), nullptr, added};
    for (const Weight* weight : {&int8, &int4}) {
        Scratch<uint32_t> room;
        Scratch<char> prepared;
        const TilesOf tiles(*weight, &room);
        product(*tiles, rows_for(*tiles, x.data(), M, prepared), added, y.data(), M);
        const auto value = [&](int64_t n, int64_t k) { return weight == &int8 ? in_8_bits(n, k) : in_4_bits(n, k); };
        Numbers64 rounding(M * N);
        for (int64_t i = 0; weight == &int4 && i < M * N; i++)
            for (int64_t k = 0; k < whole; k++)
                rounding[i] += std::fabs(widen(x[i / N * whole + k]) * in_4_bits(i % N, k)) / 512;
        compare("widened tiles", y, expected(weight->K, value, added), 1e-4, rounding);
    }
}

// Attention of one row (T queries, each of which sees keys [first(t), last(t))): y (T, H, D)
template <class Key, class Value, class First, class Last>
static Numbers64 attention(const std::vector<bf16>& q, int64_t H, int64_t G, int64_t T, int64_t D, float scale, float cap,
                           Key key, Value value, First first, Last last) {
    Numbers64 y(T * H * D);
    for (int64_t h = 0; h < H; h++)
        for (int64_t t = 0; t < T; t++) {
            double total = 0, most = -INFINITY;
            Numbers64 scores;
            for (int64_t n = first(t); n < last(t); n++) {
                double s = 0;
                for (int64_t d = 0; d < D; d++) s += double(widen(q[(h * T + t) * D + d])) * key(h / (H / G), n, d);
                s *= scale;
                if (cap > 0) s = cap * std::tanh(s / cap);
                scores.push_back(s), most = std::max(most, s);
            }
            for (auto& s : scores) total += s = std::exp(s - most);
            for (int64_t n = first(t); n < last(t); n++)
                for (int64_t d = 0; d < D; d++)
                    y[(t * H + h) * D + d] += scores[n - first(t)] / total * value(h / (H / G), n, d);
        }
    return y;
}

static void check_attention() {
    const int64_t G = draw(1, 3), H = G * draw(1, 5), D = std::array<int64_t, 6>{64, 24, 80, 128, 32, 256}[draw(0, 5)];
    const int64_t N = draw(1, 150), T = std::min<int64_t>(N, draw(1, 6));
    const float scale = 1.0f / std::sqrt(float(D)), cap = draw(0, 1) ? 5.0f : 0.0f;
    const auto q = numbers(H * T * D), k = numbers(G * N * D), v = numbers(G * N * D);
    std::vector<bf16> bias(T * N), y(T * H * D);
    for (int64_t t = 0; t < T; t++)
        for (int64_t n = 0; n < N; n++) bias[t * N + n] = n <= N - T + t ? 0 : 0xff80;
    const int64_t strides[] = {0, T * D, D, 0, N * D, D, 0, N * D, D, 0, N};
    const auto key = [&](int64_t g, int64_t n, int64_t d) { return double(widen(k[(g * N + n) * D + d])); };
    const auto value = [&](int64_t g, int64_t n, int64_t d) { return double(widen(v[(g * N + n) * D + d])); };
    const auto last = [&](int64_t t) { return N - T + t + 1; };
    const auto all_from_0 = [](int64_t) { return int64_t(0); };
    const auto expected = attention(q, H, G, T, D, scale, cap, key, value, all_from_0, last);
    attend(q.data(), k.data(), v.data(), nullptr, nullptr, 0, bias.data(), nullptr, y.data(), 1, H, G, T, N, D, strides, scale, cap);
    compare("attend", y, expected, 4e-3);
    const int64_t window = draw(1, N);
    attend_causally(q.data(), k.data(), v.data(), nullptr, y.data(), 1, H, G, T, N, D, window, strides, scale, cap);
    const auto first = [&](int64_t t) { return std::max<int64_t>(0, last(t) - window); };
    compare("attend_causally", y, attention(q, H, G, T, D, scale, cap, key, value, first, last), 8e-3);

    for (int64_t kind : {INT8, INT4, INT5}) {
        const int64_t bits = kind == INT8 ? 8 : kind == INT4 ? 4 : 5, size = kind == INT8 ? D : padded(D) * bits / 8;
        const int64_t scales = kind == INT8 ? 1 : 2 * ((D + GROUP - 1) / GROUP);
        std::vector<char> codes[2];
        std::vector<bf16> scale_of[2], decoded[2];
        Vectors encoded[2];
        for (int i = 0; i < 2; i++) {
            codes[i].resize(G * N * size), scale_of[i].resize(G * N * scales), decoded[i].resize(G * N * D);
            encoded[i] = {codes[i].data(), scale_of[i].data(), kind, 0, {0, N * size, size}, {0, N * scales, scales}};
            for (int64_t slot = 0; slot < G * N; slot++) {
                const Vectors own = encoded[i].at(0, slot / N, slot % N);
                encode(own, (i ? v : k).data() + slot * D, D);
                decode(own, D, decoded[i].data() + slot * D);
            }
        }
        const auto part = [&](int i) {
            return [&, i](int64_t g, int64_t n, int64_t d) { return double(widen(decoded[i][(g * N + n) * D + d])); };
        };
        attend(q.data(), nullptr, nullptr, encoded, nullptr, 0, bias.data(), nullptr, y.data(), 1, H, G, T, N, D, strides, scale,
               cap);
        const auto coded = attention(q, H, G, T, D, scale, cap, part(0), part(1), all_from_0, last);
        compare(kind == INT8 ? "attend int8" : kind == INT4 ? "attend int4" : "attend int5", y, coded, 1e-2);
    }
}

// The first keys and values in 2 bits, the others in slots that begin anew after the last
static void check_two_bits() {
    const int64_t G = draw(1, 2), H = G * draw(1, 5), D = std::array<int64_t, 6>{64, 24, 80, 128, 32, 256}[draw(0, 5)];
    const int64_t sealed = SPLIT_KEYS * draw(0, 2), newest = 2 * SPLIT_KEYS, T = draw(1, 6), N = sealed + draw(T, newest);
    const int64_t units[] = {std::array<int64_t, 3>{16, 32, 64}[draw(0, 2)], SPLIT_KEYS}, width = words(D) * WORD;
    const float scale = 1.0f / std::sqrt(float(D)), cap = draw(0, 1) ? 5.0f : 0.0f;
    const auto q = numbers(H * T * D);
    std::vector<bf16> all[2], plain[2], scales[2], y(T * H * D), bias(T * N);
    std::vector<uint32_t> codes[2];
    Vectors encoded[2];
    for (int i = 0; i < 2; i++) {
        const int64_t blocks = sealed / units[i], block = i ? SPLIT_KEYS / WORD * width : units[0] * words(D);
        const int64_t block_scales = i ? 2 * SPLIT_KEYS * ((D + units[0] - 1) / units[0]) : 2 * D;
        all[i] = numbers(G * N * D), plain[i].resize(G * newest * D);
        codes[i].resize(G * blocks * block), scales[i].resize(G * blocks * block_scales);
        encoded[i] = {(char*)codes[i].data(), scales[i].data(), TWO_BITS, 0, {0, 4 * blocks * block, 4 * block},
                      {0, blocks * block_scales, block_scales}, units[i], units[0]};
        for (int64_t g = 0; g < G; g++) {
            bf16* own = all[i].data() + g * N * D;
            for (int64_t n = sealed; n < N; n++)
                std::copy_n(own + n * D, D, plain[i].data() + (g * newest + n % newest) * D);
            for (int64_t n = 0; n < sealed; n += units[i]) {
                const auto token = [&](int64_t j) { return own + (n + j) * D; };
                i ? encode_values(encoded[i].at(0, g, n), D, token) : encode_keys(encoded[i].at(0, g, n), D, token);
            }
        }
    }
    for (int64_t t = 0; t < T; t++)
        for (int64_t n = 0; n < N; n++) bias[t * N + n] = n <= N - T + t ? 0 : 0xff80;
    const int64_t strides[] = {0, T * D, D, 0, newest * D, D, 0, newest * D, D, 0, N};
    const auto part = [&](int i) {
        return [&, i](int64_t g, int64_t n, int64_t d) {
            float x[MAX_D];
            if (n < sealed) (i ? decode_value : decode_key)(encoded[i].at(0, g, 0), n, D, x);
            return double(n < sealed ? x[d] : widen(all[i][(g * N + n) * D + d]));
        };
    };
    attend(q.data(), plain[0].data(), plain[1].data(), encoded, &sealed, newest, bias.data(), nullptr, y.data(), 1, H, G, T, N, D,
           strides, scale, cap);
    const auto expected = attention(q, H, G, T, D, scale, cap, part(0), part(1), [](int64_t) { return int64_t(0); },
                                    [&](int64_t t) { return N - T + t + 1; });
    compare("attend 2 bits", y, expected, 1e-2);
}

static void expect(const char* what, bool holds) {
    if (!holds) failures++, std::printf("%s\n", what);
}

// Tokens that enter a cache whose policy sums up what queries see; what stays is taken from the kernel, once it is checked
static void check_tails() {
    const int64_t G = draw(1, 2), H = G * draw(1, 3), D = 8 * draw(1, 10), P = draw(1, 40), C = P + draw(2, 60), kept = C - P, heads = H / G;
    const int64_t T = draw(1, 4 * C), n_sink = draw(0, kept / 3), recent = draw(1, kept / 2), row_of_cache = draw(0, 1), none = 0;
    const float scale = 1.0f / std::sqrt(float(D)), cap = draw(0, 1) ? 5.0f : 0.0f;
    const auto q = numbers(H * T * D), k = numbers(G * T * D), v = numbers(G * T * D);
    std::vector<bf16> keys(2 * G * C * D), values(keys.size()), queries(2 * H * P * D), y(T * H * D);
    std::vector<int32_t> positions(2 * G * C);
    std::vector<float> sums(2 * G * C);
    std::vector<TailStep> steps;
    for (int64_t first = 0, filled = 0, size = 0; first < T; first += size, filled += size) {
        const bool evicts = filled == C;
        const Boundary boundary{filled, filled - size, size, evicts};
        if (evicts) filled = kept;
        steps.push_back({std::min({P, C - filled, T - first}), first > 0, boundary});
        size = steps.back().T;
    }
    const int64_t bytes = D * int64_t(sizeof(bf16)), n_steps = int64_t(steps.size()), counts[] = {1, T, n_steps};
    const int64_t strides[] = {0, T * D, D, 0, T * D, D, 0, T * D, D};
    std::vector<int32_t> log(n_steps * G * C);
    const ScoredCache cache{H, G, D, C, n_sink, recent, kept, 1, P, scale, cap, nullptr, queries.data(), positions.data(), sums.data(),
                            {{(char*)keys.data(), bytes}, {(char*)values.data(), bytes}}, {}};
    run_tails(&cache, counts, q.data(), k.data(), v.data(), strides, &row_of_cache, &none, &none, steps.data(), y.data(), log.data());

    Numbers64 outputs(T * H * D);
    const auto weights = [&](int64_t h, int64_t t, const std::vector<int64_t>& at) {
        Numbers64 found;
        double total = 0;
        for (int64_t p : at) {
            double s = 0;
            for (int64_t d = 0; d < D; d++) s += double(widen(q[(h * T + t) * D + d])) * widen(k[(h / heads * T + p) * D + d]);
            s *= scale;
            found.push_back(p <= t ? std::exp(cap > 0 ? cap * std::tanh(s / cap) : s) : 0), total += found.back();
        }
        for (double& x : found) x /= total;
        return found;
    };
    for (int64_t g = 0; g < G; g++) {
        std::vector<int64_t> at;
        std::map<int64_t, double> seen;  // sums, by position
        for (int64_t s = 0, first = 0; s < n_steps; first += steps[s++].T) {
            for (int64_t t = first - steps[s].boundary.n_queries; steps[s].looks && t < first; t++)
                for (int64_t h = g * heads; h < (g + 1) * heads; h++) {
                    const auto own = weights(h, t, at);
                    for (size_t j = 0; j < at.size(); j++) seen[at[j]] += own[j];
                }
            const bool evicts = steps[s].boundary.evicts;
            const int32_t* found = log.data() + (s * G + g) * C;
            const std::vector<int64_t> stay(found, found + (evicts ? kept : int64_t(at.size())));
            double least = 1e9, most = -1e9;  // of those that stay, and of those that leave
            for (size_t j = 0; j < at.size(); j++) {
                const bool stays = std::binary_search(stay.begin(), stay.end(), at[j]);
                const bool must = int64_t(j) < n_sink || int64_t(j) >= int64_t(at.size()) - recent;
                if (stays && !must) least = std::min(least, seen[at[j]]);
                if (!stays) most = std::max(most, must ? 1e9 : seen[at[j]]);
            }
            expect("run_tails: a better token leaves", !evicts || most <= least + 1e-4);
            expect("run_tails: others stay", std::includes(at.begin(), at.end(), stay.begin(), stay.end()));
            at = stay;
            for (int64_t t = first; t < first + steps[s].T; t++) at.push_back(t);
            for (int64_t t = first; t < first + steps[s].T; t++)
                for (int64_t h = g * heads; h < (g + 1) * heads; h++) {
                    const auto own = weights(h, t, at);
                    for (size_t j = 0; j < at.size(); j++)
                        for (int64_t d = 0; d < D; d++)
                            outputs[(t * H + h) * D + d] += own[j] * widen(v[(g * T + at[j]) * D + d]);
                }
        }
    }
    compare("run_tails", y, outputs, 8e-3);
}

// A look at keys that are encoded is that at them as decoded.
static void check_looks() {
    const int64_t G = draw(1, 2), H = G * draw(1, 3), D = 16 * draw(1, 6), C = draw(4, 90), kept = draw(2, C - 1), n = draw(1, 20);
    const int64_t kind = std::array<int64_t, 3>{INT8, INT4, INT5}[draw(0, 2)], size = code_bytes(kind, D), scales = scale_count(kind, D);
    const int64_t zeros[] = {0, 0};
    std::vector<bf16> all = numbers(2 * G * C * D), decoded = all, scale(2 * G * C * scales), queries = numbers(2 * H * n * D);
    std::vector<char> codes(2 * G * C * size);
    std::vector<int32_t> positions[2];
    std::vector<float> sums[2];
    const Vectors encoded{codes.data(), scale.data(), kind, 0, {G * C * size, C * size, size}, {G * C * scales, C * scales, scales}};
    for (int64_t slot = 0; slot < 2 * G * C; slot++) {
        encode(encoded.at(0, 0, slot), all.data() + slot * D, D);
        decode(encoded.at(0, 0, slot), D, decoded.data() + slot * D);
    }
    const int64_t pool = draw(0, 1) ? 1 : 3;
    std::vector<Look> looks;
    for (int i : {0, 1}) {
        positions[i].resize(2 * G * C), sums[i].resize(2 * G * C);
        ScoredCache cache{H, G, D, C, 1, 1, kept, pool, n, 0.2f, 0, nullptr, queries.data(), positions[i].data(), pool > 1 ? nullptr : sums[i].data()};
        cache.slots[0] = {(char*)decoded.data(), 0};  // not moved: the other look is at them too
        if (i) cache.slots[0] = {codes.data(), 0}, cache.encoded = encoded;
        looks.push_back({cache, 2, nullptr, zeros, zeros, {C, C - std::min(n, C), std::min(n, C), 1}});
    }
    run_looks(looks.data(), 2);
    expect("run_looks: codes", positions[0] == positions[1] && sums[0] == sums[1]);
}

static const int64_t seen[] = {0, int64_t(1) << 40, 0, 0, 0};  // all keys of a row up to a query's own

static void check_rows() {
    const int64_t G = draw(1, 2), H = G * draw(1, 3), D = 16 * draw(1, 5), a = draw(1, 40), N = a + draw(1, 40);
    const int64_t ends[] = {a, N}, strides[] = {H * D, D, G * D, D, G * D, D};
    std::vector<float> q(N * H * D), k(N * G * D), v(N * G * D), y(N * H * D), logs(H * N);
    for (auto* x : {&q, &k, &v})
        for (auto& value : *x) value = normal();
    std::vector<uint8_t> mask(G * N * N);
    for (int64_t i = 0; i < G * N * N; i++) mask[i] = i % N == i / N % N || draw(0, 2) == 0;  // a token sees itself
    for (bool masked : {false, true}) {  // two rows, or all tokens as one row with masks
        const int64_t given[] = {0, seen[1], 0, masked ? (int64_t)mask.data() : 0, N * N};
        attend_rows(q.data(), k.data(), v.data(), y.data(), logs.data(), H, G, D, masked ? 1 : 2, ends + masked, strides, given, 0.2f, 0);
        double worst = 0;
        for (int64_t h = 0; h < H; h++)
            for (int64_t t = 0; t < N; t++) {
                const int64_t begin = masked || t < a ? 0 : a, g = h / (H / G);
                Numbers64 weights;
                double total = 0;
                for (int64_t n = begin; n <= t; n++) {
                    double s = 0;
                    for (int64_t d = 0; d < D; d++) s += double(q[(t * H + h) * D + d]) * k[(n * G + g) * D + d];
                    weights.push_back(masked && !mask[(g * N + t) * N + n] ? 0 : std::exp(0.2f * s)), total += weights.back();
                }
                for (int64_t d = 0; d < D; d++) {
                    double sum = 0;
                    for (int64_t n = begin; n <= t; n++) sum += weights[n - begin] / total * v[(n * G + g) * D + d];
                    worst = std::max(worst, std::fabs(sum - y[(t * H + h) * D + d]));
                }
            }
        if (!(worst < 1e-5)) failures++, std::printf("attend_rows%s: differs by %g\n", masked ? ", masks" : "", worst);
    }
}

// In bfloat16; gradients are compared with those in float
static void check_narrow_rows() {
    const int64_t G = draw(1, 2), H = G * draw(1, 2), D = 16 * draw(1, 5), a = draw(1, 220), N = a + draw(1, 40);
    const int64_t ends[] = {a, N}, strides[] = {H * D, D, G * D, D, G * D, D, H * D, G * D};
    const auto q = numbers(N * H * D), k = numbers(N * G * D), v = numbers(N * G * D), dy = numbers(N * H * D);
    const auto wide = [](const std::vector<bf16>& x) {
        std::vector<float> y;
        for (bf16 value : x) y.push_back(widen(value));
        return y;
    };
    const auto q2 = wide(q), k2 = wide(k), v2 = wide(v), dy2 = wide(dy);
    std::vector<bf16> y(N * H * D), dq(N * H * D), dk(N * G * D), dv(N * G * D);
    std::vector<float> y2(N * H * D), dq2(N * H * D), dk2(N * G * D), dv2(N * G * D), logs(H * N), logs2(H * N), parts(2 * N * H * D);
    attend_rows(q.data(), k.data(), v.data(), y.data(), logs.data(), H, G, D, 2, ends, strides, seen, 0.2f, 1);
    attend_rows(q2.data(), k2.data(), v2.data(), y2.data(), logs2.data(), H, G, D, 2, ends, strides, seen, 0.2f, 0);
    attend_rows_backward(q.data(), k.data(), v.data(), y.data(), dy.data(), logs.data(), dq.data(), parts.data(), dk.data(), dv.data(), H,
                         G, D, 2, ends, strides, seen, 0.2f, 1);
    attend_rows_backward(q2.data(), k2.data(), v2.data(), y2.data(), dy2.data(), logs2.data(), dq2.data(), parts.data(), dk2.data(),
                         dv2.data(), H, G, D, 2, ends, strides, seen, 0.2f, 0);
    compare("attend_rows in bfloat16", y, {y2.begin(), y2.end()}, 1e-2);
    compare("gradients of queries", dq, {dq2.begin(), dq2.end()}, 1e-2);
    compare("gradients of keys", dk, {dk2.begin(), dk2.end()}, 1e-2);
    compare("gradients of values", dv, {dv2.begin(), dv2.end()}, 1e-2);
}

static void check_matrices() {
    const int64_t M = draw(1, 80), K = draw(1, 80), N = draw(1, 150), a_turned = draw(0, 1), b_turned = draw(0, 1);
    const auto a = numbers(M * K), b = numbers(K * N), bias = numbers(N);
    std::vector<bf16> c(M * N);
    const int64_t a_strides[] = {a_turned ? 1 : K, a_turned ? M : 1}, b_strides[] = {b_turned ? 1 : N, b_turned ? K : 1};
    multiply_matrices(a.data(), b.data(), bias.data(), c.data(), M, K, N, a_strides[0], a_strides[1], b_strides[0], b_strides[1], 0);
    Numbers64 expected;
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            double sum = widen(bias[n]);
            for (int64_t i = 0; i < K; i++)
                sum += double(widen(a[m * a_strides[0] + i * a_strides[1]])) * widen(b[i * b_strides[0] + n * b_strides[1]]);
            expected.push_back(sum);
        }
    compare("multiply_matrices", c, expected, 1e-4);
}

static void check_norm() {
    const int64_t rows = draw(1, 5), size = draw(1, 200);
    const auto x = numbers(rows * size), weight = numbers(size);
    std::vector<bf16> y(rows * size);
    Numbers64 expected;
    rms_norm(x.data(), weight.data(), y.data(), rows, size, 1e-5f, 1.0f);
    for (int64_t r = 0; r < rows; r++) {
        double sum = 0;
        for (int64_t i = 0; i < size; i++) sum += double(widen(x[r * size + i])) * widen(x[r * size + i]);
        for (int64_t i = 0; i < size; i++)
            expected.push_back(widen(x[r * size + i]) / std::sqrt(sum / double(size) + 1e-5) * (widen(weight[i]) + 1.0));
    }
    compare("rms_norm", y, expected, 1e-5);
}

static void check_likeliest() {
    const int64_t B = draw(1, 3), N = draw(1, 3000);
    const bf16 rare[] = {0x0000, 0x8000, 0xff80, 0x7f80, 0xffc1, 0x7fc0};  // zeros, infinities and NaN
    std::vector<bf16> x(B * N);
    const float shift = float(draw(-1, 1)) * 100.0f;
    for (auto& value : x) value = draw(0, 9) ? narrow(std::round(normal() * 2.0f) + shift) : rare[draw(0, 2)];
    if (draw(0, 2) == 0) x[draw(0, B * N - 1)] = rare[draw(0, 5)];
    if (draw(0, 4) == 0) std::fill_n(x.begin(), N, rare[2]);
    std::vector<int64_t> found(B);
    find_likeliest(x.data(), found.data(), B, N);
    for (int64_t b = 0; b < B; b++) {
        int64_t best = 0;
        bool finite = true;
        for (int64_t i = 0; i < N; i++) {
            const float own = widen(x[b * N + i]);
            finite = finite && own < INFINITY;  // no NaN either
            if (own > widen(x[b * N + best])) best = i;
        }
        finite = finite && widen(x[b * N + best]) > -INFINITY;
        expect("likeliest", found[b] == (finite ? best : -1));
    }
}

int main(int count, char** arguments) {
    source.seed(count > 1 ? unsigned(std::atoi(arguments[1])) : 0);
    use_encoded_split(attend_encoded_split);
    for (int i = 0; i < (count > 2 ? std::atoi(arguments[2]) : 10); i++)
        check_products(), check_attention(), check_two_bits(), check_tails(), check_looks(), check_rows(), check_narrow_rows(), check_matrices(), check_norm(), check_likeliest();
    std::printf("%d differences\n", failures);
    return failures != 0;
}
