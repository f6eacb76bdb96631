// Attention over the encoded keys of a KV split, by the number of queries: with two_bits_splits.cpp a library of its own, which
// caches in fewer bits need.

#include "encoded_split.h"

void attend_two_bits_split(const SplitQueries&, const Vectors& k, const Vectors& v, const Vectors& ahead);

extern "C" void attend_encoded_split(const SplitQueries& x, const Vectors& k, const Vectors& v, const Vectors& ahead) {
    using Run = void (*)(const SplitQueries&, const Vectors&, const Vectors&, const Vectors&);
    const Run by_vector[] = {attend_encoded<1>, attend_encoded<2>, attend_encoded<3>, attend_encoded<4>};
    (k.by_vector() ? by_vector[x.count - 1] : attend_two_bits_split)(x, k, v, ahead);
}
