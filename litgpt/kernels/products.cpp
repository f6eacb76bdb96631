// Tiles of products, by the kind of weight. A unit of its own, for units are compiled side by side.

#include "tiles.h"

#include <new>

namespace {

template <class W>
const Tiles* put(char* place, const W& w) {
    static_assert(sizeof(Kind<W>) <= sizeof(Tiles) + 80);
    return new (place) Kind<W>(w);
}

template <int GROUP>
const Tiles* put_int4(char* place, const Weight& w, Scratch<uint32_t>* scratch) {
    return scratch ? put(place, Widened<Int4<GROUP>>(w, *scratch)) : put(place, Int4<GROUP>(w));
}

}  // namespace

TilesOf::TilesOf(const Weight& w, Scratch<uint32_t>* scratch) {
    if (w.kind == BLOCKED)
        tiles = put(place, Blocked(w));
    else if (w.kind == PLAIN_ROWS)
        tiles = put(place, Plain(w));
    else if (w.kind == INT8_ROWS)
        tiles = scratch ? put(place, Widened<Int8>(w, *scratch)) : put(place, Int8(w));
    else
        tiles = w.group == 32   ? put_int4<32>(place, w, scratch)
                : w.group == 64 ? put_int4<64>(place, w, scratch)
                                : put_int4<128>(place, w, scratch);
}

void compute_block(const uint32_t* w, int64_t K, const Rows& x, int rows, float* y) {
    compute_tile(Blocked(w, K, BLOCK_TILE), 0, x, 0, rows, y, {nullptr, 0, 0});
}
