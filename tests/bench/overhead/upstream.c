/* A model server that costs next to nothing: OpenAI's format from prepared bytes, one write per event.
 *
 * Argument: a file of records (each a 32-bit length in this machine's order, then its bytes: the plain answer, then the
 * events of a stream with their framing). Prints its port; ends when its stdin is closed. Events go as fast as they are
 * taken, or with `"user": "pace-5"` in the request one per 5 ms. Streams that are open at once take turns, event by
 * event, as those of a real server do: whoever reads fast enough gets them apart, not in one piece.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST_RECORDS = 4096, READ_AT_ONCE = 65536, EVENTS = 256, BACKLOG = 4096 };

struct record { const char *bytes; size_t length; };

struct connection {
    int fd;
    char *received;
    size_t length, capacity;
    int at, until;      /* records to send: none when they are equal */
    size_t sent;        /* of the record `at` */
    int place;          /* in `sending`, -1 when not there */
    int blocked;        /* its socket takes no more for now */
    long long pace, due; /* ns: between the events of its stream, 0 for none; when the next is sent */
};

static struct record records[MOST_RECORDS];
static int record_count;
static struct connection **sending;
static int sending_count, sending_capacity;
static int epoll_fd;

static void die(const char *what) { perror(what); exit(1); }

static long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void read_records(const char *path) {
    FILE *file = fopen(path, "rb");
    unsigned int length;
    if (!file) die(path);
    while (record_count < MOST_RECORDS && fread(&length, 4, 1, file) == 1) {
        char *bytes = malloc(length);
        if (!bytes || fread(bytes, 1, length, file) != length) die("record");
        records[record_count++] = (struct record){bytes, length};
    }
    fclose(file);
}

static void begin_sending(struct connection *c) {
    if (c->place >= 0) return;
    if (sending_count == sending_capacity) {
        sending_capacity = sending_capacity ? 2 * sending_capacity : 64;
        sending = realloc(sending, sending_capacity * sizeof *sending);
    }
    c->place = sending_count;
    sending[sending_count++] = c;
}

static void end_sending(struct connection *c) {
    if (c->place < 0) return;
    sending[c->place] = sending[--sending_count];
    sending[c->place]->place = c->place;
    c->place = -1;
}

static void watch(struct connection *c, unsigned int events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
}

static void close_connection(struct connection *c) {
    end_sending(c);
    close(c->fd);
    free(c->received);
    free(c);
}

/* Whether the connection is still there. */
static int send_one(struct connection *c) {
    struct record *r = &records[c->at];
    ssize_t n = send(c->fd, r->bytes + c->sent, r->length - c->sent, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) {
        close_connection(c);
        return 0;
    }
    if (n > 0) c->sent += n;
    if (c->sent < r->length) {
        c->blocked = 1;
        watch(c, EPOLLIN | EPOLLOUT);
        return 1;
    }
    c->sent = 0;
    c->due += c->pace;
    if (++c->at == c->until) end_sending(c);
    return 1;
}

/* Length of a whole request at the beginning of what was received, 0 when it is not whole; where its body begins. */
static size_t whole_request(struct connection *c, size_t *body) {
    char *end = memmem(c->received, c->length, "\r\n\r\n", 4), *line;
    size_t stated = 0;
    if (!end) return 0;
    *body = end - c->received + 4;
    for (line = c->received; line < end; line = (char *)memchr(line, '\n', end + 2 - line) + 1) {
        if (!strncasecmp(line, "content-length:", 15)) stated = strtoul(line + 15, 0, 10);
        if (!strncasecmp(line, "transfer-encoding:", 18)) {
            char *last = memmem(end, c->received + c->length - end, "\r\n0\r\n\r\n", 7);
            return last ? last + 7 - c->received : 0;
        }
    }
    return c->length >= *body + stated ? *body + stated : 0;
}

static int streamed(const char *body, size_t length) {
    return memmem(body, length, "\"stream\":true", 13) || memmem(body, length, "\"stream\": true", 14);
}

static long long pace_of(const char *body, size_t length) {
    const char *stated = memmem(body, length, "\"pace-", 6);
    return stated ? atoll(stated + 6) * 1000000 : 0;
}

static int answer_whole_requests(struct connection *c) {
    size_t body, length;
    while (c->at == c->until && (length = whole_request(c, &body))) {
        int stream = streamed(c->received + body, length - body);
        c->pace = stream ? pace_of(c->received + body, length - body) : 0;
        memmove(c->received, c->received + length, c->length - length);
        c->length -= length;
        c->at = stream ? 1 : 0;
        c->until = stream ? record_count : 1;
        c->due = now();
        begin_sending(c);
        if (!stream && !send_one(c)) return 0;
    }
    return 1;
}

static void receive(struct connection *c) {
    for (;;) {
        if (c->capacity - c->length < READ_AT_ONCE) {
            c->capacity = 2 * c->capacity + READ_AT_ONCE;
            c->received = realloc(c->received, c->capacity);
        }
        size_t room = c->capacity - c->length;
        ssize_t n = recv(c->fd, c->received + c->length, room, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN)) {
            close_connection(c);
            return;
        }
        if (n < 0) return;
        c->length += n;
        if (!answer_whole_requests(c)) return;
        if ((size_t)n < room) return;
    }
}

static void accept_all(int listener) {
    int fd, on = 1;
    while ((fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0) {
        struct connection *c = calloc(1, sizeof *c);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        c->fd = fd;
        c->place = -1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
    }
}

/* One event of each stream that may send; milliseconds until the next one may, -1 for never. */
static int take_turns(void) {
    long long at = now(), next = -1; /* what has no pace was due when it was asked for */
    for (int i = sending_count - 1; i >= 0; i--) {
        struct connection *c = sending[i];
        if (!c->blocked && (!c->pace || c->due <= at) && (!send_one(c) || c->place < 0)) {
            continue;
        }
        if (!c->blocked && (next < 0 || c->due < next)) next = c->due;
    }
    if (next < 0) return -1;
    return next <= at ? 0 : (int)((next - at) / 1000000) + 1;
}

static int listen_on_loopback(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(fd, (struct sockaddr *)&address, size) || listen(fd, BACKLOG)) die("listen");
    getsockname(fd, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

int main(int argc, char **argv) {
    struct epoll_event ready[EVENTS], event = {.events = EPOLLIN};
    int wait = -1, listener;
    if (argc != 2) return 2;
    signal(SIGPIPE, SIG_IGN);
    read_records(argv[1]);
    epoll_fd = epoll_create1(0);
    listener = listen_on_loopback();
    event.data.ptr = &listener;
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    event.data.ptr = 0;
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, STDIN_FILENO, &event)) die("stdin");
    for (;;) {
        int count = epoll_wait(epoll_fd, ready, EVENTS, wait);
        for (int i = 0; i < count; i++) {
            struct connection *c = ready[i].data.ptr;
            if (!c) return 0;
            if ((void *)c == (void *)&listener) {
                accept_all(listener);
                continue;
            }
            if (ready[i].events & EPOLLOUT) {
                c->blocked = 0;
                watch(c, EPOLLIN);
            }
            if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(c);
        }
        wait = take_turns();
    }
}
