// Attention over the keys of a KV split, by the number of queries. A unit of its own, for units are compiled side by side.

#include "encoded_split.h"
#include "split.h"
#include "two_bits_split.h"

void SplitQueries::attend(const Vectors& k, const Vectors& v, const Vectors& ahead) const {
    using Run = void (*)(const SplitQueries&, const Vectors&, const Vectors&, const Vectors&);
    const Run by_vector[] = {attend_encoded<1>, attend_encoded<2>, attend_encoded<3>, attend_encoded<4>};
    const Run in_two_bits[] = {attend_two_bits<1>, attend_two_bits<2>, attend_two_bits<3>, attend_two_bits<4>};
    (k.by_vector() ? by_vector : in_two_bits)[count - 1](*this, k, v, ahead);
}
