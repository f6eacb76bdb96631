// Attention over the keys of a KV split in 2 bits, by the number of queries. A unit of its own, for units are compiled side by side.

#include "two_bits_split.h"

void attend_two_bits_split(const SplitQueries& x, const Vectors& k, const Vectors& v, const Vectors& ahead) {
    using Run = void (*)(const SplitQueries&, const Vectors&, const Vectors&, const Vectors&);
    const Run runs[] = {attend_two_bits<1>, attend_two_bits<2>, attend_two_bits<3>, attend_two_bits<4>};
    runs[x.count - 1](x, k, v, ahead);
}
