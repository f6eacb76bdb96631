// Attention over the keys of a KV split, by the number of queries. A unit of its own, for units are compiled side by side.

#include "encoded_split.h"
#include "split.h"

void SplitQueries::attend(const Vectors& k, const Vectors& v, const Vectors& ahead) const {
    const auto run = count == 1   ? attend_encoded<1>
                     : count == 2 ? attend_encoded<2>
                     : count == 3 ? attend_encoded<3>
                                  : attend_encoded<4>;
    run(*this, k, v, ahead);
}
