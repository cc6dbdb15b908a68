// Marching cubes: twin of ../mesh/extract.py, with the case table of cubes.cuh.
//
// The grid of r nodes along an axis has one more on every side, which are outside.  Which nodes are inside is
// kept as bits, 32 along x in a word: a thread takes the cubes that begin at a word's nodes, and finds
// out with a few operations that there are none to do.  A vertex belongs to the node at the lower end of its
// edge; those of a word are numbered by axis and then by node.
#include "cubes.cuh"
#include "grid.cuh"

typedef unsigned long long Row;  // a word's bits, and the first one of the next word

struct Lattice {
    int r, side, words;  // nodes of the field and of the padded grid along an axis, words along x
};

DEVICE Lattice lattice_of(int r) { return {r, r + 2, (r + 2 + 31) / 32}; }

// Where a word stands: first node [y, z, x] of the padded grid.
struct Spot {
    int y, z, w;
};

DEVICE Spot spot_of(const Lattice& lattice, int word) {
    return {word / (lattice.side * lattice.words), word / lattice.words % lattice.side, word % lattice.words};
}

DEVICE int word_at(const Lattice& lattice, const Spot& at) {
    return (at.y * lattice.side + at.z) * lattice.words + at.w;
}

DEVICE Row row_at(const unsigned* HOT bits, const Lattice& lattice, const Spot& at) {
    if (at.y >= lattice.side || at.z >= lattice.side || at.w >= lattice.words) return 0;
    const unsigned* word = bits + word_at(lattice, at);
    return word[0] | (Row)(at.w + 1 < lattice.words ? word[1] & 1u : 0u) << 32;
}

// The field at a node of the padded grid, in node spacings, a little away from zero.
DEVICE float value_at(const float* HOT sdf, int r, float voxel, float least, int y, int z, int x) {
    const int place[3] = {y - 1, z - 1, x - 1};
    int node = 0;
    bool added = false;
    for (int axis = 0; axis < 3; ++axis) {
        node = node * r + clampi(place[axis], 0, r - 1);
        added |= place[axis] < 0 || place[axis] >= r;
    }
    float value = sdf[node] / voxel;
    if (added) value = fmaxf(value, 1.0f);
    return fabsf(value) < least ? (value < 0.0f ? -least : least) : value;
}

// Bits of the nodes of a word whose edges along y, z and x the surface crosses.
struct Crossings {
    unsigned along[3];
};

DEVICE Crossings crossings_at(const unsigned* HOT bits, const Lattice& lattice, const Spot& at) {
    const Row own = row_at(bits, lattice, at);
    const Row above = row_at(bits, lattice, {at.y + 1, at.z, at.w});
    const Row behind = row_at(bits, lattice, {at.y, at.z + 1, at.w});
    return {{(unsigned)(own ^ above), (unsigned)(own ^ behind), (unsigned)(own ^ own >> 1)}};
}

// How many vertices of a word come before the one on a node's edge.
DEVICE int rank_of(const Crossings& crossings, int bit, int axis) {
    int rank = __popc(crossings.along[axis] & ((1u << bit) - 1u));
    for (int before = 0; before < axis; ++before) rank += __popc(crossings.along[before]);
    return rank;
}

// Which corners of the cube at a node are inside.
DEVICE int case_of(const Row* rows, int bit) {
    int found = 0;
    for (int corner = 0; corner < 8; ++corner)
        found |= (int)(rows[corner >> 1] >> (bit + (corner & 1)) & 1) << corner;
    return found;
}

// The four rows that the cubes of a word lie between, and bits of those that the surface crosses.
DEVICE unsigned crossed_cubes(const unsigned* HOT bits, const Lattice& lattice, const Spot& at, Row* rows) {
    Row any = 0, all = ~(Row)0;
    for (int k = 0; k < 4; ++k) {
        rows[k] = row_at(bits, lattice, {at.y + (k >> 1), at.z + (k & 1), at.w});
        any |= rows[k] | rows[k] >> 1;
        all &= rows[k] & rows[k] >> 1;
    }
    return (unsigned)(any & ~all);
}

// The table's entry for a cube.  On a face where inside and outside corners take turns, the bilinear field
// between them joins the inside ones if its saddle is inside (Nielson and Hamann, "The asymptotic decider",
// 1991).  Both cubes at the face compare the same two numbers.
DEVICE int entry_of(const float* HOT sdf, int r, float voxel, float least, const Spot& at, const Row* rows, int bit) {
    const int found = case_of(rows, bit);
    int entry = FIRST_ENTRY[found];
    unsigned left = AMBIGUOUS[found];
    for (int place = 0; left; left &= left - 1) {
        const int face = __ffs(left) - 1;
        float product[2] = {1.0f, 1.0f};  // of the outside corners, of the inside ones
        for (int k = 0; k < 4; ++k) {
            const int corner = FACE_CORNERS[4 * face + k];
            const int y = at.y + (corner >> 2), z = at.z + (corner >> 1 & 1), x = 32 * at.w + bit + (corner & 1);
            float& own = product[found >> corner & 1];
            own = times(own, value_at(sdf, r, voxel, least, y, z, x));
        }
        entry += (product[1] > product[0]) << place++;
    }
    return entry;
}

// Bits (side, side, words) of the nodes that are inside.
KERNEL mark_inside(const float* HOT sdf, int r, unsigned* bits) {
    const Lattice lattice = lattice_of(r);
    const int words = lattice.side * lattice.side * lattice.words;
    for (int word = thread_index(); word < words; word += thread_count()) {
        const Spot at = spot_of(lattice, word);
        unsigned found = 0;
        if (at.y >= 1 && at.y <= r && at.z >= 1 && at.z <= r) {
            const float* row = sdf + ((at.y - 1) * r + at.z - 1) * r - 1;
            for (int x = max(32 * at.w, 1); x < min(32 * at.w + 32, r + 1); ++x)
                found |= (unsigned)(row[x] < 0.0f) << (x - 32 * at.w);
        }
        bits[word] = found;
    }
}

// Vertices and faces of every word: counts (2, side * side * words).
KERNEL count_cubes(
    const float* HOT sdf, int r, float voxel, float least, const unsigned* HOT bits, int* counts
) {
    const Lattice lattice = lattice_of(r);
    const int words = lattice.side * lattice.side * lattice.words;
    for (int word = thread_index(); word < words; word += thread_count()) {
        const Spot at = spot_of(lattice, word);
        Row rows[4];
        unsigned left = crossed_cubes(bits, lattice, at, rows);
        const Crossings crossings = crossings_at(bits, lattice, at);
        int vertices = 0, faces = 0;
        for (int axis = 0; axis < 3; ++axis) vertices += __popc(crossings.along[axis]);
        for (; left; left &= left - 1) {
            const int entry = entry_of(sdf, r, voxel, least, at, rows, __ffs(left) - 1);
            faces += FIRST_TRIANGLE[entry + 1] - FIRST_TRIANGLE[entry];
        }
        counts[word] = vertices;
        counts[words + word] = faces;
    }
}

// World place of the vertex on the edge from a node along an axis.
DEVICE void place_vertex(
    const float* HOT sdf, int r, float voxel, float least, int y, int z, int x, int axis, float* vertex
) {
    const double a = value_at(sdf, r, voxel, least, y, z, x);
    const double b = value_at(sdf, r, voxel, least, y + (axis == 0), z + (axis == 1), x + (axis == 2));
    double place[3] = {y - 0.5, z - 0.5, x - 0.5};
    place[axis] += a / (a - b);
    for (int c = 0; c < 3; ++c) vertex[c] = (float)(place[(c + 2) % 3] * (2.0 / r) - 1.0);  // x, y, z
}

// Writes them: first (2, side * side * words) says where those of a word begin.
KERNEL emit_cubes(
    const float* HOT sdf, int r, float voxel, float least, const unsigned* HOT bits, const int* HOT first,
    float* vertices, int* faces
) {
    const Lattice lattice = lattice_of(r);
    const int words = lattice.side * lattice.side * lattice.words;
    for (int word = thread_index(); word < words; word += thread_count()) {
        const Spot at = spot_of(lattice, word);
        Row rows[4];
        unsigned left = crossed_cubes(bits, lattice, at, rows);
        const Crossings crossings = crossings_at(bits, lattice, at);
        long long vertex = first[word], face = first[words + word];
        for (int axis = 0; axis < 3; ++axis)
            for (unsigned crossed = crossings.along[axis]; crossed; crossed &= crossed - 1, ++vertex)
                place_vertex(
                    sdf, r, voxel, least, at.y, at.z, 32 * at.w + __ffs(crossed) - 1, axis, vertices + 3 * vertex
                );
        for (; left; left &= left - 1) {
            const int bit = __ffs(left) - 1, entry = entry_of(sdf, r, voxel, least, at, rows, bit);
            for (int triangle = FIRST_TRIANGLE[entry]; triangle < FIRST_TRIANGLE[entry + 1]; ++triangle, ++face)
                for (int k = 0; k < 3; ++k) {
                    const int edge = TRIANGLES[triangle] >> 4 * k & 15, corner = EDGE_CORNER[edge];
                    const int x = bit + (corner & 1);
                    const Spot node = {at.y + (corner >> 2), at.z + (corner >> 1 & 1), at.w + x / 32};
                    const Crossings around = crossings_at(bits, lattice, node);
                    faces[3 * face + k] = first[word_at(lattice, node)] + rank_of(around, x % 32, edge / 4);
                }
        }
    }
}
