/* A load generator that is never the limit: prepared requests over kept-alive connections, times of every answer.
 *
 * Arguments: port, file of records (each a 32-bit length in this machine's order, then a whole HTTP request),
 * connections, seconds, warm-up seconds, requests a second (0: each connection sends its next request when the last is
 * answered), most requests (0: any number), fewest events of an answer (0: it is no stream), seed. In a request each
 * run of eight '@' becomes eight letters that no other request of this seed has. Prints a JSON document: see `Measured`
 * in load.py, which does the same where there is no compiler. Requests sent during the warm-up are not timed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "answer.h"

enum { MARK = 8, EVENTS = 256, READ_AT_ONCE = 262144, MOST_CONNECTIONS = 16384 };
#define GRACE (20 * S) /* for answers to requests that were sent before the end */

struct request { char *bytes; size_t length; int marks, *at; };

struct connection {
    int fd, busy, blocked;
    struct request *request;
    char *copy;                 /* what is being sent: the request, its marks replaced */
    size_t sent, copied;
    struct answer answer;
    long long since;            /* ns: when it was sent, or was due */
    struct connection *next;    /* of those that are free */
};

static struct request *requests;
static int request_count, port, fewest_events, epoll_fd, timer, opened, in_flight, open_loop;
static long long next_request, serial, sent_requests, most, warm_until, stop_at;
static long long answered, counted, failed, reasons[4], events_seen;
static const char *const REASONS[] = {"status", "broken off", "too few events", "not answered"};
static double *times, *firsts;
static long long timed, timed_capacity;
static char sample[SAMPLE + 1];
static struct connection *free_connections, *all[MOST_CONNECTIONS];

static void die(const char *what) { perror(what); exit(1); }

static void read_requests(const char *path) {
    FILE *file = fopen(path, "rb");
    unsigned int length;
    if (!file) die(path);
    while (fread(&length, 4, 1, file) == 1) {
        requests = realloc(requests, (request_count + 1) * sizeof *requests);
        struct request *r = &requests[request_count++];
        *r = (struct request){.bytes = malloc(length), .length = length};
        if (fread(r->bytes, 1, length, file) != length) die("request");
        for (char *p = r->bytes; (p = memmem(p, r->bytes + length - p, "@@@@@@@@", MARK)); p += MARK) {
            r->at = realloc(r->at, (r->marks + 1) * sizeof *r->at);
            r->at[r->marks++] = p - r->bytes;
        }
    }
    fclose(file);
}

static void letters(char *into) { /* 26^8 different ones, in no order that anybody sees */
    unsigned long long n = (unsigned long long)serial++ * 92821000003ULL % 208827064576ULL;
    for (int i = 0; i < MARK; i++, n /= 26) into[i] = 'a' + n % 26;
}

static void add_time(struct connection *c, long long at) {
    if (timed == timed_capacity) {
        timed_capacity = timed_capacity ? 2 * timed_capacity : 65536;
        times = realloc(times, timed_capacity * sizeof *times);
        firsts = realloc(firsts, timed_capacity * sizeof *firsts);
    }
    times[timed] = (at - c->since) / 1e9;
    firsts[timed++] = (c->answer.first - c->since) / 1e9;
}

static void fail(struct connection *c, int reason) {
    failed++;
    reasons[reason]++;
    if (!sample[0]) snprintf(sample, sizeof sample, "%.120s | %.*s", c->answer.head, (int)c->answer.text_length, c->answer.text);
}

static void open_connection(struct connection *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    int on = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0) die("socket");
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event);
    c->blocked = 0;
}

static struct connection *new_connection(void) {
    if (opened == MOST_CONNECTIONS) return 0;
    struct connection *c = calloc(1, sizeof *c);
    all[opened++] = c;
    open_connection(c);
    return c;
}

static void send_more(struct connection *c) {
    while (c->sent < c->copied) {
        ssize_t n = send(c->fd, c->copy + c->sent, c->copied - c->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0) break; /* what is wrong with it, reading will show */
        c->sent += n;
    }
    if (c->blocked != (c->sent < c->copied)) {
        c->blocked = !c->blocked;
        struct epoll_event event = {.events = EPOLLIN | (c->blocked ? EPOLLOUT : 0), .data.ptr = c};
        epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
    }
}

static void ask(struct connection *c, long long since) {
    struct request *r = &requests[next_request++ % request_count];
    c->copy = realloc(c->copy, r->length);
    memcpy(c->copy, r->bytes, r->length);
    for (int i = 0; i < r->marks; i++) letters(c->copy + r->at[i]);
    c->copied = r->length;
    c->sent = 0;
    c->busy = 1;
    c->since = since;
    await_answer(&c->answer, fewest_events > 0);
    sent_requests++;
    in_flight++;
    send_more(c);
}

static void again(struct connection *c, int reopen);

static void ended(struct connection *c, int reason, int reopen) {
    long long at = now();
    struct answer *a = &c->answer;
    int ok = reason < 0 && a->status == 200 && (!fewest_events || (a->done && a->events >= fewest_events));
    in_flight--;
    c->busy = 0;
    answered++;
    if (!ok) fail(c, reason >= 0 ? reason : a->status != 200 ? 0 : 2);
    else if (c->since >= warm_until) add_time(c, at);
    if (ok && at >= warm_until && at <= stop_at) {
        counted++;
        events_seen += a->events;
    }
    again(c, reopen || a->closing);
}

static int more_to_send(void) { return now() < stop_at && !(most && sent_requests >= most); }

static void again(struct connection *c, int reopen) {
    if (reopen) {
        close(c->fd);
        open_connection(c);
    }
    if (open_loop) {
        c->next = free_connections;
        free_connections = c;
    } else if (more_to_send()) ask(c, now());
}

static void receive(struct connection *c) {
    static char bytes[READ_AT_ONCE];
    ssize_t n = recv(c->fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    if (n > 0) {
        if (c->busy && take(&c->answer, bytes, n)) ended(c, -1, 0);
    } else if (c->busy) {
        ended(c, n == 0 && ends_when_closed(&c->answer) ? -1 : 1, 1);
    } else { /* closed while idle */
        close(c->fd);
        open_connection(c);
    }
}

static void print_times(const char *name, const double *values) {
    printf("\"%s\": [", name);
    for (long long i = 0; i < timed; i++) printf("%s%.6f", i ? "," : "", values[i]);
    printf("], ");
}

static void print_measured(double seconds) {
    printf("{");
    print_times("times_s", times);
    print_times("first_s", firsts);
    printf("\"reasons\": {");
    for (int i = 0, some = 0; i < 4; i++)
        if (reasons[i]) printf("%s\"%s\": %lld", some++ ? ", " : "", REASONS[i], reasons[i]);
    printf("}, \"sample\": \"");
    for (char *p = sample; *p; p++) putchar(*p < ' ' || *p > '~' || *p == '"' || *p == '\\' ? ' ' : *p);
    printf("\", \"requests\": %lld, \"counted\": %lld, \"failed\": %lld, \"events\": %lld, \"seconds\": %.6f}\n", answered,
           counted, failed, events_seen, seconds);
}

/* Sends what is due; when the next will be, 0 for never. */
static long long send_due(long long started, double rate) {
    for (;;) {
        long long due = started + (long long)(sent_requests * S / rate);
        struct connection *c = free_connections;
        if (due >= stop_at || (most && sent_requests >= most)) return 0;
        if (due > now()) return due;
        if (c) free_connections = c->next;
        else if (!(c = new_connection())) return now() + S / 1000;
        ask(c, due);
    }
}

static void handle_events(void) {
    struct epoll_event ready[EVENTS];
    int count = epoll_wait(epoll_fd, ready, EVENTS, 1000);
    for (int i = 0; i < count; i++) {
        struct connection *c = ready[i].data.ptr;
        unsigned long long expired;
        if (!c) {
            if (read(timer, &expired, sizeof expired) < 0) continue;
            continue;
        }
        if (ready[i].events & EPOLLOUT) send_more(c);
        if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(c);
    }
}

static void run(long long started, double rate) {
    long long next = 0;
    if (!open_loop)
        for (int i = 0; i < opened; i++) ask(all[i], now());
    for (;;) {
        if (open_loop && (next = send_due(started, rate))) {
            struct itimerspec when = {.it_value = {next / S, next % S}};
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, 0);
        }
        if (!in_flight && !next) return;
        handle_events();
        if (now() > stop_at + GRACE) return;
    }
}

int main(int argc, char **argv) {
    struct epoll_event event = {.events = EPOLLIN};
    if (argc != 10) return 2;
    port = atoi(argv[1]);
    read_requests(argv[2]);
    int connections = atoi(argv[3]);
    double seconds = atof(argv[4]), warm = atof(argv[5]), rate = atof(argv[6]);
    most = atoll(argv[7]);
    fewest_events = atoi(argv[8]);
    serial = next_request = atoll(argv[9]);
    open_loop = rate > 0;
    signal(SIGPIPE, SIG_IGN);
    epoll_fd = epoll_create1(0);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer, &event);
    for (int i = 0; i < connections; i++) {
        struct connection *c = new_connection();
        c->next = free_connections;
        free_connections = c;
    }
    long long started = now();
    warm_until = started + (long long)(warm * S);
    stop_at = warm_until + (long long)(seconds * S);
    run(started, rate);
    for (int i = 0; i < opened; i++)
        if (all[i]->busy) answered++, fail(all[i], 3);
    long long last = now();
    print_measured(((last < stop_at || most ? last : stop_at) - warm_until) / 1e9);
    return 0;
}
