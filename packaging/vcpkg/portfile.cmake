# An overlay port of the tree that it stands in:
#   vcpkg install balancekv --overlay-ports=packaging/vcpkg --no-binarycaching
# vcpkg looks at this folder alone to see whether anything changed: with its archive of binaries it
# would go on with the header of an earlier run.
set(VCPKG_BUILD_TYPE release) # a header: nothing to build, nothing to debug
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)

file(INSTALL "${SOURCE_PATH}/balancekv.h" DESTINATION "${CURRENT_PACKAGES_DIR}/include")
set(INCLUDE_DIR "../../include")
foreach(name balancekv-config balancekv-config-version)
  configure_file("${SOURCE_PATH}/packaging/${name}.cmake.in"
    "${CURRENT_PACKAGES_DIR}/share/${PORT}/${name}.cmake" @ONLY)
endforeach()
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
