/* An HTTP/1.1 answer as it comes in, however it is cut: its status, its end, and the events of a stream in it. */
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

enum { LONGEST_HEAD = 16384, SAMPLE = 300 };
#define S 1000000000LL

/* How the last event of a stream begins: of chat, and of the Messages and Responses APIs. */
enum { PATTERNS = 3, ALL_PATTERNS = (1 << PATTERNS) - 1 };
static const char *const PATTERN[PATTERNS] = {"data: [DONE]", "event: message_stop", "event: response.completed"};

enum state { HEAD, WHOLE, SIZE, CHUNK, CHUNK_END, TRAILER };

struct answer {
    enum state state;
    char head[LONGEST_HEAD];
    size_t head_length;
    long long left;         /* bytes of the body or of this chunk; -1 until the connection is closed */
    int status, closing;
    int stream;             /* whether the first event is waited for, not the first byte of the body */
    int events, done;       /* lines that begin with "data:"; whether one was the end of a stream */
    int line, same;         /* place in the line; bits of the patterns that it is like up to there */
    int trailer;            /* characters of this trailer line */
    char text[SAMPLE];      /* how the body begins */
    size_t text_length;
    long long first;        /* ns */
};

static inline long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * S + t.tv_nsec;
}

static inline void await_answer(struct answer *a, int stream) {
    a->state = HEAD;
    a->head_length = a->text_length = 0;
    a->head[0] = 0;
    a->events = a->done = a->line = a->status = a->closing = a->trailer = 0;
    a->same = ALL_PATTERNS;
    a->stream = stream;
    a->first = 0;
}

/* Whether it has ended well if the connection is closed now. */
static inline int ends_when_closed(const struct answer *a) { return a->state == WHOLE && a->left < 0; }

/* Compare one character of a line with all patterns. */
static inline void match(struct answer *a, char c) {
    for (int i = 0; i < PATTERNS; i++) {
        if (!(a->same & 1 << i)) continue;
        if (PATTERN[i][a->line] != c) a->same &= ~(1 << i);
        else if (!PATTERN[i][a->line + 1]) {
            a->same &= ~(1 << i);
            a->done = 1;
        }
    }
    a->line++;
    if (a->same & 1 && a->line == 5 && !a->events++ && !a->first) a->first = now();
}

static inline void look_at(struct answer *a, const char *p, size_t length) {
    const char *end = p + length;
    if (a->text_length < SAMPLE) {
        size_t more = length < SAMPLE - a->text_length ? length : SAMPLE - a->text_length;
        memcpy(a->text + a->text_length, p, more);
        a->text_length += more;
    }
    if (!a->stream && length && !a->first) a->first = now();
    while (p < end) {
        if (*p == '\n') {
            a->line = 0;
            a->same = ALL_PATTERNS;
            p++;
        } else if (a->same) {
            match(a, *p++);
        } else {
            p = memchr(p, '\n', end - p);
            if (!p) return;
        }
    }
}

static inline const char *header(const char *head, const char *name) {
    size_t length = strlen(name);
    for (const char *line = strchr(head, '\n'); line; line = strchr(line + 1, '\n'))
        if (!strncasecmp(line + 1, name, length)) return line + 1 + length;
    return 0;
}

static inline void read_head(struct answer *a) {
    const char *length = header(a->head, "content-length:"), *coding = header(a->head, "transfer-encoding:");
    const char *kept = header(a->head, "connection:");
    a->status = atoi(a->head + 9);
    a->closing = kept && !strncasecmp(kept + strspn(kept, " "), "close", 5);
    a->left = coding ? 0 : length ? atoll(length) : -1;
    a->state = coding ? SIZE : WHOLE;
}

/* One byte of what is no body; whether the answer has ended with it. */
static inline int take_framing(struct answer *a, char byte) {
    if (a->state == HEAD && a->head_length < LONGEST_HEAD - 1) {
        a->head[a->head_length++] = byte;
        a->head[a->head_length] = 0;
        if (byte == '\n' && a->head_length > 3 && !memcmp(a->head + a->head_length - 4, "\r\n\r\n", 4)) read_head(a);
        return a->state == WHOLE && !a->left;
    }
    if (a->state == SIZE && byte == '\n') a->state = a->left > 0 ? CHUNK : TRAILER;
    else if (a->state == SIZE && strchr("0123456789abcdefABCDEF", byte))
        a->left = 16 * a->left + (byte & 15) + (byte > '9' ? 9 : 0);
    else if (a->state == CHUNK_END && byte == '\n') a->state = SIZE;
    else if (a->state == TRAILER && byte == '\n') {
        if (!a->trailer) return 1;
        a->trailer = 0;
    } else if (a->state == TRAILER && byte != '\r') a->trailer = 1;
    return 0;
}

/* Whether the answer is complete with these bytes. */
static inline int take(struct answer *a, const char *p, size_t length) {
    const char *end = p + length;
    while (p < end) {
        if (a->state != WHOLE && a->state != CHUNK) {
            if (take_framing(a, *p++)) return 1;
            continue;
        }
        size_t n = end - p;
        if (a->left >= 0 && (long long)n > a->left) n = a->left;
        look_at(a, p, n);
        p += n;
        if (a->left < 0) continue;
        a->left -= n;
        if (!a->left && a->state == WHOLE) return 1;
        if (!a->left) a->state = CHUNK_END;
    }
    return 0;
}
