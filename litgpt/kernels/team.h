// How many threads compute. One whose processor is taken by another program makes all others wait for it, many times in
// every layer. So a team has as many threads as it gets processors, which is the processor time of all its threads by the
// clock; now and then one more is tried.

#pragma once

#include <time.h>

#include <algorithm>

#ifdef _OPENMP
extern "C" int omp_get_max_threads();  // declared here, since Apple's compiler lacks OpenMP's header
extern "C" int omp_get_num_threads();
#else
inline int omp_get_max_threads() { return 1; }
inline int omp_get_num_threads() { return 1; }
#endif

inline double clock_seconds(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

inline double processor_seconds() { return clock_seconds(CLOCK_THREAD_CPUTIME_ID); }  // of this thread

class Team {
    static constexpr double WINDOW = 0.025;                        // seconds that are looked at together
    static constexpr double LEAST_PAUSE = 0.25, MOST_PAUSE = 0.5;  // seconds until one more is tried
    int most = 0, size = 0;
    bool is_trying = false;
    double elapsed = 0, used = 0, pause = LEAST_PAUSE, next = 0;

    static double now() { return clock_seconds(CLOCK_MONOTONIC); }

public:
    // The team of the calling thread, whose threads of OpenMP are its own as well
    static Team& mine() {
        static thread_local Team team;
        return team;
    }

    // Threads for a call
    int threads() {
        const int allowed = omp_get_max_threads();
        if (allowed != most) *this = Team(), most = size = allowed;
        return size + is_trying;
    }

    // Threads for a call that is reported when it is over
    int threads_of_report() {
        threads();
        if (size < most && !is_trying && now() >= next) is_trying = true, elapsed = used = 0;
        return threads();
    }

    // A call took so many seconds by the clock, and its threads so many of processors.
    void report(double seconds_elapsed, double seconds_used) {
        const int count = threads();
        elapsed += seconds_elapsed, used += seconds_used;
        if (count == 1 || elapsed < WINDOW) return;
        const int processors = int(used / elapsed + 0.3 + 0.03 * count);
        if (processors < count) {
            size = is_trying ? size : std::max(1, processors);
            next = now() + pause, pause = std::min(2 * pause, MOST_PAUSE);
        } else if (is_trying) {
            size = count, next = 0, pause = LEAST_PAUSE;
        }
        is_trying = false, elapsed = used = 0;
    }
};
