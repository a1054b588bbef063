/* Loaded before all others into the ranks of a stage: kills its process in the midst of a call that touches the disk, or
 * lets one fail, where somebody asked for that; and gives a Python process another time of day.
 *
 * STORM names a folder. There the file `aim` holds `CALL SKIP FOLDER`: the next process that makes such a call on a path
 * with FOLDER in it, after letting SKIP of them pass, takes the file away and dies, or with CALL `eio` has its fsync fail.
 * The file `clock` holds the seconds by which a Python process that starts is ahead. The file `hold.STAGE` holds the last
 * step that the stage may make for now: the line of a later one waits, until that changes or a signal comes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char aim[4096], orders[4000];
static long ahead;

__attribute__((constructor)) static void begin(void) {
  const char *folder = getenv("STORM");
  if (!folder || strncmp(program_invocation_short_name, "python", 6)) return;
  char clock[4096];
  snprintf(orders, sizeof orders, "%s", folder);
  snprintf(aim, sizeof aim, "%s/aim", folder);
  snprintf(clock, sizeof clock, "%s/clock", folder);
  FILE *file = fopen(clock, "r");
  if (file) {
    if (fscanf(file, "%ld", &ahead) != 1) ahead = 0;
    fclose(file);
  }
}

static __thread int busy; /* in a look, which touches the disk itself */

/* Whether it is meant: this call, on this path. */
static int meant(const char *call, const char *path) {
  char wanted[16], folder[64], mine[4200];
  int skip = 0, hit = 0;
  if (!*aim || busy || access(aim, F_OK)) return 0;
  busy = 1;
  FILE *file = fopen(aim, "r");
  if (file) {
    hit = fscanf(file, "%15s %d %63s", wanted, &skip, folder) == 3 && !strcmp(wanted, call) && strstr(path, folder);
    fclose(file);
  }
  if (hit && skip > 0) {
    snprintf(mine, sizeof mine, "%s.%d", aim, getpid());
    if ((file = fopen(mine, "w"))) {
      fprintf(file, "%s %d %s\n", wanted, skip - 1, folder);
      fclose(file);
      REAL(rename)(mine, aim);
    }
    hit = 0;
  }
  if (hit) {
    snprintf(mine, sizeof mine, "%s.taken", aim);
    hit = REAL(rename)(aim, mine) == 0;
  }
  busy = 0;
  return hit;
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static const char *path_of(int fd) {
  static __thread char path[4096];
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  path[size > 0 ? size : 0] = 0;
  return path;
}

static void hold(int fd, const void *data, size_t size) {
  static int released; /* a process that is to stop may still have to finish a step */
  static const char key[] = "\"step\": ", file_name[] = "/metrics.jsonl";
  const char *step = memmem(data, size, key, sizeof key - 1);
  if (!*orders || released || busy || !step) return;
  char stage[4096], path[4200];
  snprintf(stage, sizeof stage, "%s", path_of(fd));
  char *end = strstr(stage, file_name);
  if (!end) return;
  *end = 0;
  snprintf(path, sizeof path, "%s/hold.%s", orders, strrchr(stage, '/') + 1);
  busy = 1;
  while (!released) {
    long last = 0;
    FILE *file = fopen(path, "r");
    if (!file) break;
    int known = fscanf(file, "%ld", &last) == 1;
    fclose(file);
    if (known && atol(step + sizeof key - 1) <= last) break;
    struct timespec moment = {0, 50 * 1000 * 1000};
    released = nanosleep(&moment, NULL) != 0;
  }
  busy = 0;
}

ssize_t write(int fd, const void *data, size_t size) {
  hold(fd, data, size);
  if (*aim && !busy && !access(aim, F_OK) && meant("write", path_of(fd))) { REAL(write)(fd, data, size / 2); die(); }
  return REAL(write)(fd, data, size);
}
static int opened(const char *symbol, const char *path, int flags, mode_t mode) {
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, symbol);
  if ((flags & O_CREAT) && meant("open", path)) die();
  return real(path, flags, mode);
}
#define OPEN(name)                                                                                     \
  int name(const char *path, int flags, ...) {                                                         \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more);             \
    return opened(#name, path, flags, mode);                                                           \
  }
OPEN(open)
OPEN(open64)
int fsync(int fd) {
  if (*aim && !busy && !access(aim, F_OK)) {
    if (meant("fsync", path_of(fd))) die();
    if (meant("eio", path_of(fd))) { errno = EIO; return -1; }
  }
  return REAL(fsync)(fd);
}
int rename(const char *from, const char *to) { if (meant("rename", to)) die(); return REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { if (meant("mkdir", path)) die(); return REAL(mkdir)(path, mode); }
int unlinkat(int folder, const char *path, int flags) { if (meant("unlink", path_of(folder))) die(); return REAL(unlinkat)(folder, path, flags); }

int clock_gettime(clockid_t clock, struct timespec *now) {
  int code = REAL(clock_gettime)(clock, now);
  if (clock == CLOCK_REALTIME) now->tv_sec += ahead;
  return code;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  int code = REAL(gettimeofday)(now, zone);
  now->tv_sec += ahead;
  return code;
}
time_t time(time_t *now) {
  time_t value = REAL(time)(NULL) + ahead;
  if (now) *now = value;
  return value;
}
