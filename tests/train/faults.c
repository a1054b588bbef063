/* Counts the calls that touch the disk, and kills the process at one of them, or in the middle of a write. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

static atomic_long calls;
static long fatal = -1; /* the number of the call that kills; 0 only counts; -1 does neither */

void fault_arm(long number) { atomic_store(&calls, 0); fatal = number; }
long fault_disarm(void) { fatal = -1; return atomic_load(&calls); }

static int now(void) {
  if (fatal < 0) return 0;
  return atomic_fetch_add(&calls, 1) + 1 == fatal;
}
static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int regular(int fd) { struct stat facts; return fstat(fd, &facts) == 0 && S_ISREG(facts.st_mode); }

ssize_t write(int fd, const void *data, size_t size) {
  if (fatal >= 0 && regular(fd) && now()) { REAL(write)(fd, data, size / 2); die(); }
  return REAL(write)(fd, data, size);
}
static int opened(const char *symbol, const char *path, int flags, mode_t mode) {
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, symbol);
  if ((flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR)) && now()) die();
  return real(path, flags, mode);
}
#define OPEN(name)                                                                                     \
  int name(const char *path, int flags, ...) {                                                         \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more);             \
    return opened(#name, path, flags, mode);                                                           \
  }
OPEN(open)
OPEN(open64)
int fsync(int fd) { if (now()) die(); return REAL(fsync)(fd); }
int ftruncate64(int fd, off64_t size) { if (now()) die(); return REAL(ftruncate64)(fd, size); }
int rename(const char *from, const char *to) { if (now()) die(); return REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { if (now()) die(); return REAL(mkdir)(path, mode); }
int rmdir(const char *path) { if (now()) die(); return REAL(rmdir)(path); }
int unlink(const char *path) { if (now()) die(); return REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) { if (now()) die(); return REAL(unlinkat)(folder, path, flags); }
