# Adds llama.cpp as a subdirectory: the targets llama, ggml, ggml-base and one for each backend.
#
# Sets LMINF_LLAMA_CPP (the source folder) and LMINF_LIBRARIES (the shared libraries to install).

set(command ${CMAKE_CURRENT_LIST_DIR}/get_llama_cpp.py prepare --into ${CMAKE_BINARY_DIR})
if (LMINF_STOCK)
    list(APPEND command --stock)
endif()
message(STATUS "Preparing the llama.cpp source")
execute_process(
    COMMAND ${Python_EXECUTABLE} ${command}
    RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE error OUTPUT_STRIP_TRAILING_WHITESPACE)
if (NOT result EQUAL 0)
    string(REPLACE "\n" "\n  " error "${error}") # indented lines are printed as they are, not wrapped
    message(FATAL_ERROR "\n  ${error}")
endif()
set(LMINF_LLAMA_CPP ${output})
set_property(DIRECTORY ${CMAKE_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    cmake/get_llama_cpp.py cmake/llama.cpp.lock.json src/patches/llama.cpp.patch)

set(BUILD_SHARED_LIBS ON)
foreach (extra COMMON TESTS TOOLS EXAMPLES SERVER APP)
    set(LLAMA_BUILD_${extra} OFF)
endforeach()

# ggml's own threads, made for each graph. Those of OpenMP wait as the environment said when libgomp was loaded, which may
# have been for another package, and a forked child waits for ever for those of its parent.
if (NOT LMINF_STOCK)
    set(GGML_OPENMP OFF)
endif()

# llama.cpp asks git for its own commit; here that would be the commit of whatever repository the build folder is in.
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT "unknown")
set(GIT_EXE OFF CACHE STRING "not used by ggml's build" FORCE)

# EXCLUDE_FROM_ALL also leaves llama.cpp's own headers, pkg-config and CMake files out of the installation.
add_subdirectory(${LMINF_LLAMA_CPP} ${CMAKE_BINARY_DIR}/llama.cpp EXCLUDE_FROM_ALL)

# One file and one loaded instance of each library. With a version, a wheel (which has no links) would hold three copies
# of each, two of which a process can load; and another package's libggml.so.0 could be taken for ours.
set(LMINF_LIBRARIES)
foreach (library llama ggml ggml-base ${GGML_AVAILABLE_BACKENDS})
    if (TARGET ${library}) # the list of backends is kept in the CMake cache and may name some that are off by now
        set_property(TARGET ${library} PROPERTY VERSION)
        set_property(TARGET ${library} PROPERTY SOVERSION)
        list(APPEND LMINF_LIBRARIES ${library})
    endif()
endforeach()

# Threads that wait give way to others.
if (NOT LMINF_STOCK AND NOT MSVC)
    set(relax ${CMAKE_CURRENT_LIST_DIR}/ggml_relax.h)
    set(relaxed ${LMINF_LLAMA_CPP}/ggml/src/ggml-cpu/ggml-cpu.c)
    file(STRINGS ${relaxed} relax_calls REGEX "^ +ggml_thread_cpu_relax\\(\\);")
    if (NOT relax_calls)
        message(FATAL_ERROR "${relaxed} calls no ggml_thread_cpu_relax(): ${relax} has to follow what it does now")
    endif()
    set_property(SOURCE ${relaxed} TARGET_DIRECTORY ggml-cpu APPEND PROPERTY COMPILE_OPTIONS -include ${relax})
    set_property(SOURCE ${relaxed} TARGET_DIRECTORY ggml-cpu APPEND PROPERTY OBJECT_DEPENDS ${relax})
endif()

# The extension uses llama.cpp's parser of grammars, which is no part of llama.h. Elsewhere symbols are visible by default.
set_target_properties(llama PROPERTIES WINDOWS_EXPORT_ALL_SYMBOLS ON)

# ggml's AMX kernels crash when GCC 12 optimises them: of the tile configuration that _tile_loadconfig() reads, stores are
# dropped at -O3. The other kernels of such a processor are close in speed.
option(LMINF_AMX "Use AMX where the compiler's target has it" OFF)
if (NOT LMINF_AMX AND TARGET ggml-cpu AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND NOT MSVC)
    include(CheckCXXCompilerFlag)
    check_cxx_compiler_flag("-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" LMINF_HAVE_NO_AMX)
    if (LMINF_HAVE_NO_AMX)
        target_compile_options(ggml-cpu PRIVATE -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
    endif()
endif()
