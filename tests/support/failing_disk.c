/* A disk that fails on purpose, for LD_PRELOAD. See failing_disk.py.

   failing_disk_set takes rules, separated by newlines: operation|pattern|at|times|outcome
     operation  create, open, write, fsync, rename, unlink (also rmdir) or mkdir
     pattern    of the path, as fnmatch(3): * also matches slashes. A rename matches by either path.
     at         the first matching call that fails, from 1
     times      how many calls fail; 0 for all later ones
     outcome    the name of an errno; "short": half of a write; "lost": nothing is done, but success
                is reported; "flip": one bit of a write changes; "kill": SIGKILL before the call
   failing_disk_log takes a file, to which calls are appended (operation, path, new path or outcome),
   and the pattern of the paths to log. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_RULES 32
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

enum { DO = 0, SHORT = -1, LOST = -2, FLIP = -3 }; /* positive: an errno */

static struct rule {
    char operation[16], pattern[PATH_MAX], outcome[16];
    long at, times, calls;
} rules[MAX_RULES];
static int num_rules, log_descriptor = -1;
static char logged[PATH_MAX];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static const struct { const char *name; int number; } errors[] = {
    {"EIO", EIO}, {"ENOSPC", ENOSPC}, {"EROFS", EROFS}, {"EDQUOT", EDQUOT}, {"EACCES", EACCES},
    {"ENOENT", ENOENT}, {"ESTALE", ESTALE}, {"EINVAL", EINVAL},
};

void failing_disk_set(const char *text) {
    pthread_mutex_lock(&mutex);
    num_rules = 0;
    char *copy = strdup(text), *rest = copy, *line;
    while ((line = strsep(&rest, "\n")) && num_rules < MAX_RULES) {
        struct rule *rule = &rules[num_rules];
        memset(rule, 0, sizeof *rule);
        if (sscanf(line, "%15[^|]|%4095[^|]|%ld|%ld|%15s", rule->operation, rule->pattern,
                   &rule->at, &rule->times, rule->outcome) == 5)
            num_rules++;
        else if (*line) {
            fprintf(stderr, "failing_disk: cannot read the rule %s\n", line);
            abort();
        }
    }
    free(copy);
    pthread_mutex_unlock(&mutex);
}

void failing_disk_log(const char *path, const char *pattern) {
    pthread_mutex_lock(&mutex);
    if (log_descriptor >= 0)
        syscall(SYS_close, log_descriptor);
    log_descriptor = *path ? (int)syscall(SYS_openat, AT_FDCWD, path,
                                          O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    snprintf(logged, sizeof logged, "%s", pattern);
    pthread_mutex_unlock(&mutex);
}

/* Returns the outcome of a call. `other` is a rename's new path, or NULL. */
static int outcome_of(const char *operation, const char *path, const char *other) {
    if (!path)
        return DO;
    int outcome = DO;
    const char *name = "";
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < num_rules; i++) {
        struct rule *rule = &rules[i];
        if (strcmp(rule->operation, operation) ||
            (fnmatch(rule->pattern, path, 0) && (!other || fnmatch(rule->pattern, other, 0))))
            continue;
        rule->calls++;
        if (rule->calls < rule->at || (rule->times && rule->calls >= rule->at + rule->times))
            continue;
        name = rule->outcome;
        if (!strcmp(name, "kill"))
            syscall(SYS_kill, getpid(), SIGKILL);
        outcome = !strcmp(name, "short") ? SHORT : !strcmp(name, "lost") ? LOST :
                  !strcmp(name, "flip") ? FLIP : EIO;
        for (size_t j = 0; j < sizeof errors / sizeof *errors; j++)
            if (!strcmp(name, errors[j].name))
                outcome = errors[j].number;
        break;
    }
    if (log_descriptor >= 0 && (!fnmatch(logged, path, 0) || (other && !fnmatch(logged, other, 0)))) {
        char line[3 * PATH_MAX];
        int size = snprintf(line, sizeof line, "%s\t%s\t%s\t%s\n", operation, path,
                            other ? other : "", name);
        if (syscall(SYS_write, log_descriptor, line, (size_t)size) != size)
            abort();
    }
    pthread_mutex_unlock(&mutex);
    return outcome;
}

static int is_idle(void) { return num_rules == 0 && log_descriptor < 0; }

static int outcome_of_open(const char *operation, int descriptor) {
    char link[64], path[PATH_MAX];
    if (is_idle())
        return DO;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size <= 0 || path[0] != '/')
        return DO;
    path[size] = 0;
    return outcome_of(operation, path, NULL);
}

static int failed(int outcome) {
    if (outcome > 0)
        errno = outcome;
    return outcome > 0;
}

#define OPEN(name, head, arguments, path)                                                         \
    int name head {                                                                               \
        mode_t mode = 0;                                                                          \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                      \
            va_list list;                                                                         \
            va_start(list, flags);                                                                \
            mode = va_arg(list, mode_t);                                                          \
            va_end(list);                                                                         \
        }                                                                                         \
        if (!is_idle() && failed(outcome_of(flags & O_CREAT ? "create" : "open", path, NULL)))    \
            return -1;                                                                            \
        return REAL(name) arguments;                                                              \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), path)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), path)
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), path)
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), path)

#define WRITE(name, head, arguments, written_arguments)                                           \
    ssize_t name head {                                                                           \
        int outcome = outcome_of_open("write", descriptor);                                       \
        if (failed(outcome))                                                                      \
            return -1;                                                                            \
        if (outcome == LOST)                                                                      \
            return (ssize_t)size;                                                                 \
        if (outcome == SHORT && size > 1)                                                         \
            size /= 2;                                                                            \
        if (outcome == FLIP && size) {                                                            \
            char *copy = malloc(size);                                                            \
            memcpy(copy, data, size);                                                             \
            copy[size / 2] ^= 1;                                                                  \
            ssize_t written = REAL(name) written_arguments;                                       \
            free(copy);                                                                           \
            return written;                                                                       \
        }                                                                                         \
        return REAL(name) arguments;                                                              \
    }
WRITE(write, (int descriptor, const void *data, size_t size), (descriptor, data, size),
      (descriptor, copy, size))
WRITE(pwrite, (int descriptor, const void *data, size_t size, off_t at),
      (descriptor, data, size, at), (descriptor, copy, size, at))
WRITE(pwrite64, (int descriptor, const void *data, size_t size, off64_t at),
      (descriptor, data, size, at), (descriptor, copy, size, at))

static int sync_outcome(int descriptor) { return outcome_of_open("fsync", descriptor); }

int fsync(int descriptor) {
    int outcome = sync_outcome(descriptor);
    return failed(outcome) ? -1 : outcome == LOST ? 0 : REAL(fsync)(descriptor);
}

int fdatasync(int descriptor) {
    int outcome = sync_outcome(descriptor);
    return failed(outcome) ? -1 : outcome == LOST ? 0 : REAL(fdatasync)(descriptor);
}

int rename(const char *path, const char *other) {
    return !is_idle() && failed(outcome_of("rename", path, other)) ? -1 : REAL(rename)(path, other);
}

int renameat(int folder, const char *path, int other_folder, const char *other) {
    return !is_idle() && failed(outcome_of("rename", path, other))
               ? -1 : REAL(renameat)(folder, path, other_folder, other);
}

int unlink(const char *path) {
    return !is_idle() && failed(outcome_of("unlink", path, NULL)) ? -1 : REAL(unlink)(path);
}

int unlinkat(int folder, const char *path, int flags) {
    return !is_idle() && failed(outcome_of("unlink", path, NULL))
               ? -1 : REAL(unlinkat)(folder, path, flags);
}

int rmdir(const char *path) {
    return !is_idle() && failed(outcome_of("unlink", path, NULL)) ? -1 : REAL(rmdir)(path);
}

int mkdir(const char *path, mode_t mode) {
    return !is_idle() && failed(outcome_of("mkdir", path, NULL)) ? -1 : REAL(mkdir)(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    return !is_idle() && failed(outcome_of("mkdir", path, NULL))
               ? -1 : REAL(mkdirat)(folder, path, mode);
}
