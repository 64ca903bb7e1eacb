"""Optional C++ kernels for the CPU, built with g++ on first use; see `build.native_library`."""
