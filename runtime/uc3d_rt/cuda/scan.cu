// Running sums of counts: they say where each thread's output goes, whichever thread is first.
#include "grid.cuh"

#define RUN 64          // counts that one thread adds up
#define SCAN_LANES 128  // shares of all runs

// Sums (lists, runs) of the runs of counts (lists, count).
KERNEL sum_runs(const int* HOT counts, int count, int lists, int runs, int* sums) {
    for (int n = thread_index(); n < lists * runs; n += thread_count()) {
        const int* list = counts + (long long)(n / runs) * count;
        const int begin = n % runs * RUN;
        int sum = 0;
        for (int k = begin; k < min(begin + RUN, count); ++k) sum += list[k];
        sums[n] = sum;
    }
}

// Makes of them what stands before each run, and the sums (lists,) of all.  A block for each list.
KERNEL scan_runs(int* sums, int lists, int runs, int* totals) {
    SHARED int part[SCAN_LANES];
    const int share = (runs + SCAN_LANES - 1) / SCAN_LANES;
    for (int list = blockIdx.x; list < lists; list += gridDim.x) {
        int* own = sums + (long long)list * runs;
        for (int t = threadIdx.x; t < SCAN_LANES; t += blockDim.x) {
            int sum = 0;
            for (int k = t * share; k < min((t + 1) * share, runs); ++k) sum += own[k];
            part[t] = sum;
        }
        BARRIER();
        if (!threadIdx.x) {
            int before = 0;
            for (int t = 0; t < SCAN_LANES; ++t) {
                const int sum = part[t];
                part[t] = before;
                before += sum;
            }
            totals[list] = before;
        }
        BARRIER();
        for (int t = threadIdx.x; t < SCAN_LANES; t += blockDim.x) {
            int before = part[t];
            for (int k = t * share; k < min((t + 1) * share, runs); ++k) {
                const int sum = own[k];
                own[k] = before;
                before += sum;
            }
        }
        BARRIER();
    }
}

// Makes of every count the sum of those before it in its list.
KERNEL spread_runs(const int* HOT sums, int count, int lists, int runs, int* counts) {
    for (int n = thread_index(); n < lists * runs; n += thread_count()) {
        int* list = counts + (long long)(n / runs) * count;
        int before = sums[n];
        const int begin = n % runs * RUN;
        for (int k = begin; k < min(begin + RUN, count); ++k) {
            const int own = list[k];
            list[k] = before;
            before += own;
        }
    }
}
