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

# Target lminf_sanitizers: the flags of LMINF_SANITIZE, "address" (with UBSan) or "thread". Without it, nothing.
add_library(lminf_sanitizers INTERFACE)
if (LMINF_SANITIZE)
    if (LMINF_SANITIZE STREQUAL "address")
        set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=undefined)
    elseif (LMINF_SANITIZE STREQUAL "thread")
        set(sanitizers -fsanitize=thread)
    else()
        message(FATAL_ERROR "LMINF_SANITIZE is \"${LMINF_SANITIZE}\", not address or thread")
    endif()
    target_compile_options(lminf_sanitizers INTERFACE ${sanitizers} -fno-omit-frame-pointer)
    target_link_options(lminf_sanitizers INTERFACE ${sanitizers})
endif()
target_link_libraries(lminf_strict INTERFACE lminf_sanitizers)
if (LMINF_SANITIZE)
    target_compile_options(lminf_strict INTERFACE -UNDEBUG) # our assertions, not those of ggml, which a damaged state breaks
endif()
