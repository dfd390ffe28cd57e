# SPDX-License-Identifier: Apache-2.0
#
# What the Python package takes along: the library under one name, since a wheel holds no links, and the headers.
install(FILES $<TARGET_FILE:layershard_shared> DESTINATION layershard/lib RENAME liblayershard.so
	COMPONENT python EXCLUDE_FROM_ALL)
install(FILES ${public_headers} DESTINATION layershard/include/layershard COMPONENT python EXCLUDE_FROM_ALL)
