// The connected parts of a surface, and the surface without some of them: twin of `largest_parts` in
// ../mesh/surface.py.
//
// A vertex's label is a vertex of the same part with a lower number, or itself; following labels ends at the
// part's first vertex, in whichever order they were joined (Jaiganesh and Burtscher, "A high-performance
// connected components implementation for GPUs", 2018).
#include "grid.cuh"

#define VOLUME_ONE 72057594037927936.0  // 2^56; sums of volumes in fixed point may pass 64 bits on their way
#define VOLUME_RUN 32                   // faces that one thread adds up

// The first vertex of a part; labels on the way are shortened.  Only a label that points to itself is ever
// compared and swapped, and only others are shortened.
DEVICE int part_of(int* label, int vertex) {
    int ahead = label[vertex];
    while (ahead != vertex) {
        const int next = label[ahead];
        if (next != ahead) label[vertex] = next;
        vertex = ahead;
        ahead = next;
    }
    return vertex;
}

DEVICE void join(int* label, int a, int b) {
    a = part_of(label, a);
    b = part_of(label, b);
    while (a != b) {
        const int low = min(a, b), high = max(a, b);
        const int found = atomicCAS(label + high, high, low);
        if (found == high) return;
        a = part_of(label, found);
        b = low;
    }
}

KERNEL start_labels(int count, int* label, Fixed* volume) {
    for (int n = thread_index(); n < count; n += thread_count()) {
        label[n] = n;
        volume[n] = 0;
    }
}

KERNEL join_labels(const int* HOT faces, int count, int* label) {
    for (int n = thread_index(); n < count; n += thread_count()) {
        join(label, faces[3 * n], faces[3 * n + 1]);
        join(label, faces[3 * n + 1], faces[3 * n + 2]);
    }
}

// Signed volume of each part, at its first vertex.
KERNEL measure_parts(const float* HOT vertices, const int* HOT faces, int count, int* label, Fixed* volume) {
    const int runs = (count + VOLUME_RUN - 1) / VOLUME_RUN;
    for (int run = thread_index(); run < runs; run += thread_count()) {
        int part = -1;
        unsigned long long sum = 0;
        for (int n = run * VOLUME_RUN; n < min((run + 1) * VOLUME_RUN, count); ++n) {
            const int own = part_of(label, faces[3 * n]);
            if (own != part) {
                if (part >= 0) atomicAdd((unsigned long long*)volume + part, sum);
                part = own;
                sum = 0;
            }
            const float *a = vertices + 3 * faces[3 * n], *b = vertices + 3 * faces[3 * n + 1];
            const float* c = vertices + 3 * faces[3 * n + 2];
            double six = 0.0;
            for (int i = 0; i < 3; ++i) {
                const int j = (i + 1) % 3, k = (i + 2) % 3;
                six += a[i] * ((double)b[j] * c[k] - (double)b[k] * c[j]);
            }
            sum += (unsigned long long)(Fixed)(six / 6.0 * VOLUME_ONE);
        }
        if (part >= 0) atomicAdd((unsigned long long*)volume + part, sum);
    }
}

// Volume of the largest part; 0 at first.
KERNEL largest_part(const int* HOT label, const Fixed* HOT volume, int count, Fixed* largest) {
    for (int n = thread_index(); n < count; n += thread_count())
        if (label[n] == n) atomicMax(largest, volume[n]);
}

// Walls around a cavity have a negative volume.
DEVICE bool is_kept(int* label, const Fixed* volume, const Fixed* largest, double min_share, int vertex) {
    const double enough = fmax(min_share * (*largest / VOLUME_ONE), 1e-12);
    return volume[part_of(label, vertex)] / VOLUME_ONE >= enough;
}

// Which vertices and faces belong to parts that are kept: kept (2, count), the unused end of the first list 0.
KERNEL mark_kept(
    const int* HOT faces, int vertex_count, int count, int* label, const Fixed* HOT volume, const Fixed* HOT largest,
    double min_share, int* kept
) {
    for (int n = thread_index(); n < count; n += thread_count()) {
        kept[n] = n < vertex_count && is_kept(label, volume, largest, min_share, n);
        kept[count + n] = is_kept(label, volume, largest, min_share, faces[3 * n]);
    }
}

// The surface of the kept parts; number (2, count) is the running sum of what `mark_kept` wrote.
KERNEL keep_parts(
    const float* HOT vertices, const int* HOT faces, int vertex_count, int count, int* label, const Fixed* HOT volume,
    const Fixed* HOT largest, double min_share, const int* HOT number, float* out_vertices, int* out_faces
) {
    for (int n = thread_index(); n < count; n += thread_count()) {
        if (n < vertex_count && is_kept(label, volume, largest, min_share, n))
            for (int c = 0; c < 3; ++c) out_vertices[3 * number[n] + c] = vertices[3 * n + c];
        if (is_kept(label, volume, largest, min_share, faces[3 * n]))
            for (int k = 0; k < 3; ++k) out_faces[3 * number[count + n] + k] = number[faces[3 * n + k]];
    }
}
