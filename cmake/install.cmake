# SPDX-License-Identifier: Apache-2.0
#
# What is installed: libraries, headers, a pkg-config file, a CMake package, the program.
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/layershard)

install(TARGETS ${installed_libraries} EXPORT layershardTargets
	RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
	LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
	ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES ${public_headers} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/layershard)
if(LAYERSHARD_BUILD_PROGRAM)
	install(TARGETS layershard_program RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

# GNUInstallDirs allows absolute directories; ${prefix} keeps the file relocatable where they are relative.
foreach(kind LIBDIR INCLUDEDIR)
	cmake_path(APPEND LAYERSHARD_PC_${kind} "\${prefix}" ${CMAKE_INSTALL_${kind}})
endforeach()
configure_file(layershard.pc.in layershard.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/layershard.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

# Version 0: a minor version may change the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/layershardConfigVersion.cmake COMPATIBILITY SameMinorVersion)
configure_package_config_file(cmake/layershardConfig.cmake.in ${PROJECT_BINARY_DIR}/layershardConfig.cmake
	INSTALL_DESTINATION ${package_dir})
install(FILES ${PROJECT_BINARY_DIR}/layershardConfig.cmake ${PROJECT_BINARY_DIR}/layershardConfigVersion.cmake
	DESTINATION ${package_dir})
install(EXPORT layershardTargets NAMESPACE layershard:: DESTINATION ${package_dir})

# For writers of transports; where only the tests are built, just by its name: cmake --install ... --component
# conformance.
if(TARGET layershard_conformance)
	set(when COMPONENT conformance)
	if(NOT LAYERSHARD_BUILD_CONFORMANCE)
		list(APPEND when EXCLUDE_FROM_ALL)
	endif()
	configure_file(layershard-conformance.pc.in layershard-conformance.pc @ONLY)
	install(FILES $<TARGET_FILE:layershard_conformance> DESTINATION ${CMAKE_INSTALL_LIBDIR} ${when})
	install(FILES tests/conformance/layershard/transport_conformance.h
		DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/layershard
		${when})
	install(FILES ${PROJECT_BINARY_DIR}/layershard-conformance.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig
		${when})
endif()
