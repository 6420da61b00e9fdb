/* How ggml's threads wait for each other. Included before ggml-cpu.c, by the compiler's command line.
 *
 * ggml's barrier spins until all threads have come. A thread that waits so can keep the very one that it waits for from
 * running, for as long as the system lets it: on a busy machine at every operation of a model. Here it lets others run
 * after every N_SPINS pauses, some ten microseconds, which is longer than threads wait for each other on an idle machine.
 *
 * ggml's own pause, ggml_thread_cpu_relax(void), becomes lminf_relax_void(void), and its calls become lminf_relax_().
 */

#include <sched.h>

static inline void lminf_relax_void(void);

static inline void lminf_relax_(void) {
    enum { N_SPINS = 1024 };
    static _Thread_local unsigned n_spins = 0;
    lminf_relax_void();
    if (++n_spins % N_SPINS == 0) {
        sched_yield();
    }
}

#define ggml_thread_cpu_relax(arguments) lminf_relax_##arguments()
