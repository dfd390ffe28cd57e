# SPDX-License-Identifier: Apache-2.0
#
# How every target of this tree is compiled.
set(CMAKE_C_STANDARD 11)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS OFF)
set(CMAKE_C_VISIBILITY_PRESET hidden)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_UNITY_BUILD OFF) # static names repeat from file to file

add_library(layershard_flags INTERFACE)
target_compile_options(layershard_flags INTERFACE -Wall -Wextra -Wpedantic -Wconversion -Wshadow
	$<$<COMPILE_LANGUAGE:C>:-Wstrict-prototypes -Wmissing-prototypes>
	$<$<BOOL:${LAYERSHARD_WERROR}>:-Werror>)

if(LAYERSHARD_SANITIZE)
	string(REPLACE ";" "," sanitizers "${LAYERSHARD_SANITIZE}")
	add_compile_options(-fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer)
	add_link_options(-fsanitize=${sanitizers})
endif()

if(LAYERSHARD_FUZZ)
	if(NOT CMAKE_C_COMPILER_ID MATCHES Clang OR NOT "address" IN_LIST LAYERSHARD_SANITIZE)
		message(FATAL_ERROR "LAYERSHARD_FUZZ needs clang and address in LAYERSHARD_SANITIZE")
	endif()
	add_compile_options(-fsanitize=fuzzer-no-link)
endif()
