/* A machine as some are: preloaded, it says so where the real one has no other kernel and one clock for all.
 *
 * gcc -shared -fPIC -o other_machine.so other_machine.c
 * OTHER_RELEASE=7.1.0 OTHER_TIME_S=172800 OTHER_NTP=no LD_PRELOAD=./other_machine.so ...
 *
 *   OTHER_RELEASE   what uname() says
 *   OTHER_TIME_S    so many seconds the time of day is ahead
 *   OTHER_NTP       no: nobody keeps the clock; yes: somebody does
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/timex.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

int uname(struct utsname *said)
{
    const char *release = getenv("OTHER_RELEASE");
    int result = syscall(SYS_uname, said);

    if (release)
        strncpy(said->release, release, sizeof said->release - 1);
    return result;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    const char *ahead_s = getenv("OTHER_TIME_S");
    int result = syscall(SYS_clock_gettime, clock, now);

    if (ahead_s && clock == CLOCK_REALTIME)
        now->tv_sec += atoll(ahead_s);
    return result;
}

int adjtimex(struct timex *asked)
{
    const char *ntp = getenv("OTHER_NTP");
    int result = syscall(SYS_adjtimex, asked);

    if (ntp)
        asked->status = strcmp(ntp, "no") ? STA_PLL : STA_UNSYNC;
    return result;
}
