// libstdc++'s headers ask glibc 2.32 and later whether the process has one thread, to leave out atomic instructions. A
// wheel that also loads on older systems brings the answer along: it may have more.
extern "C" {
char __libc_single_threaded = 0;
}
