// The whole test framework: CHECK(condition) prints where it failed and makes the program exit with 1.

#pragma once

#include <cstdio>

static int n_failed = 0;

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            n_failed++;                                                          \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
        }                                                                        \
    } while (0)
