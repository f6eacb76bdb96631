// Attention over the keys of a KV split, by the number of queries. A unit of its own, for units are compiled side by side.

#include "split.h"

using EncodedSplit = void (*)(const SplitQueries&, const Vectors&, const Vectors&, const Vectors&);

static EncodedSplit encoded_split = nullptr;

// From now on encoded keys go to that function, which is `attend_encoded_split` of encoded_splits.cpp.
extern "C" void use_encoded_split(EncodedSplit function) { encoded_split = function; }

void SplitQueries::attend(const Vectors& k, const Vectors& v, const Vectors& ahead) const { encoded_split(*this, k, v, ahead); }
