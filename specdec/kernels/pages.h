// Where a slot's positions lie: specdec/model/pages.py.

#pragma once

#include <algorithm>

#include "numbers.h"

static constexpr i64 PAGE = 32;  // positions of a page

struct Pages {
    const i64* table;  // [slots, width]: the pages of each slot
    i64 width;

    // The place of a position, among those of all pages, in the plane of one of several heads.
    i64 place(i64 slot, i64 position, i64 heads, i64 head) const {
        const i64 page = table[slot * width + position / PAGE];
        return (page * heads + head) * PAGE + position % PAGE;
    }

    // Calls f(first, end, place of first, place of end) for positions low..high of a slot, page by
    // page. Behind the last one the place of end is any.
    template <typename F>
    void each(i64 slot, i64 low, i64 high, i64 heads, i64 head, F f) const {
        i64 here = place(slot, low, heads, head);
        for (i64 at = low, end; at < high; at = end) {
            end = std::min(high, (at / PAGE + 1) * PAGE);
            const i64 next = end < high ? place(slot, end, heads, head) : here;
            f(at, end, here, next);
            here = next;
        }
    }
};
