/* Calls functions of a library for a process of another processor: other_processor.py, which says how.
 *
 * Of the 64-bit procedure call standard of Arm, on Linux: whole numbers and addresses go to eight registers
 * and then to the stack, eight bytes each; floats and doubles to eight others. So one type of function
 * serves for all that have no more of the latter.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__aarch64__)
#error "arguments go elsewhere on this processor"
#endif

enum { WHOLE = 32, REAL = 8, BUFFERS = 32, INNER = 16 };

typedef struct {
    char name[64];
    int64_t whole[WHOLE];
    int64_t buffer[WHOLE]; /* which one `whole` is an offset into, in bytes; -1: it is a number */
    double real[REAL];     /* a float is the lower half */
    int64_t size[BUFFERS]; /* bytes; 0: none */
    struct {
        int64_t record, at, buffer, offset; /* in bytes; record < 0: none */
    } inner[INNER];                         /* addresses that lie in a buffer, to another */
} call;

typedef int64_t (*function)(
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    double, double, double, double, double, double, double, double);

static void need(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

int main(int count, char **args) {
    void *library = count == 2 ? dlopen(args[1], RTLD_NOW) : NULL;
    static call c;
    need(library != NULL, count == 2 ? dlerror() : "name a library");
    while (fread(&c, sizeof c, 1, stdin) == 1) {
        char *buffers[BUFFERS] = {NULL};
        int64_t w[WHOLE];
        const double *r = c.real;
        function f;
        void *found = dlsym(library, c.name);
        need(found != NULL, c.name);
        memcpy(&f, &found, sizeof f);
        for (int i = 0; i < BUFFERS; i++) {
            if (!c.size[i]) continue;
            need(!posix_memalign((void **)&buffers[i], 64, (size_t)c.size[i]), "no memory");
            need(fread(buffers[i], (size_t)c.size[i], 1, stdin) == 1, "an argument was cut");
        }
        for (int i = 0; i < INNER; i++) {
            if (c.inner[i].record < 0) continue;
            char *const target = buffers[c.inner[i].buffer] + c.inner[i].offset;
            memcpy(buffers[c.inner[i].record] + c.inner[i].at, &target, sizeof target);
        }
        for (int i = 0; i < WHOLE; i++) {
            w[i] = c.whole[i] + (c.buffer[i] < 0 ? 0 : (int64_t)buffers[c.buffer[i]]);
        }
        const int64_t result =
            f(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15],
              w[16], w[17], w[18], w[19], w[20], w[21], w[22], w[23], w[24], w[25], w[26], w[27], w[28], w[29], w[30],
              w[31], r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]);
        fwrite(&result, sizeof result, 1, stdout);
        for (int i = 0; i < BUFFERS; i++) {
            if (c.size[i]) fwrite(buffers[i], (size_t)c.size[i], 1, stdout);
            free(buffers[i]);
        }
        fflush(stdout);
    }
    return 0;
}
