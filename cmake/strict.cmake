# Target lminf_strict: how our own sources are compiled, in the whole build and in tests/cpp built alone.

add_library(lminf_strict INTERFACE)
target_compile_features(lminf_strict INTERFACE cxx_std_17)

if (MSVC)
    target_compile_options(lminf_strict INTERFACE /W4 $<$<BOOL:${LMINF_WERROR}>:/WX>)
else()
    target_compile_options(lminf_strict INTERFACE
        -Wall -Wextra -Wpedantic -Wcast-qual -Wnon-virtual-dtor -Woverloaded-virtual
        # a constructor's parameter may be named as the member it sets, as in llama.cpp
        $<IF:$<CXX_COMPILER_ID:GNU>,-Wshadow=local,-Wshadow>
        $<$<BOOL:${LMINF_WERROR}>:-Werror>)
endif()

if (LMINF_SANITIZE)
    set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=undefined)
    target_compile_options(lminf_strict INTERFACE ${sanitizers} -fno-omit-frame-pointer)
    target_link_options(lminf_strict INTERFACE ${sanitizers})
endif()
