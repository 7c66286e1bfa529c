package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
	"weak"
)

// The parser.

// parsed is all events of a stream, and how it ended.
func parsed(r io.Reader) (events []message, err error) {
	p := newParser(r)
	for {
		m, err := p.next()
		if err != nil {
			return events, err
		}
		m.data = bytes.Clone(m.data)
		events = append(events, m)
	}
}

// formed is events in a form that compares; that of fewer is its beginning.
func formed(events []message) string { return strings.TrimSuffix(fmt.Sprintf("%q", events), "]") }

// TestParser follows the HTML standard, section 9.2, its examples included.
func TestParser(t *testing.T) {
	event := func(name, id, data string) message { return message{name, id, []byte(data)} }
	plain := func(data ...string) (events []message) {
		for _, one := range data {
			events = append(events, event("message", "", one))
		}
		return events
	}
	long := strings.Repeat("x", 1000)
	for _, tc := range []struct {
		name, stream string
		want         []message
	}{
		{"CRLF", "id: 1\r\ndata: a\r\ndata: b\r\n\r\n", []message{event("message", "1", "a\nb")}},
		{"all three", "data: a\r\rdata: b\r\n\ndata: c\n\r\n", plain("a", "b", "c")},
		{"byte order mark", "\ufeffdata: a\n\n", plain("a")},
		{"one byte order mark", "\ufeff\ufeffdata: a\n\ndata: b\n\n", plain("b")},
		{"a later byte order mark", "\n\ufeffdata: a\n\n", nil},
		{"comments", ":\n: x\n:data: x\ndata: a\n:\n\n:\n\n", plain("a")},
		{"fields without a colon", "data\nevent\nid\nretry\nx\n\n", plain("")},
		{"one space goes", "data:a\ndata: b\ndata:  c\ndata:\td\n\n", plain("a\nb\n c\n\td")},
		{"colons in values", "data: a: b:\n\n", plain("a: b:")},
		{"no space in names", "data : a\n data: b\nDATA: c\nDate: d\n\n", nil},
		{"the standard's example of empty data", "data\n\ndata\ndata\n\ndata:", plain("", "\n")},
		{"the standard's example of ids", ": test stream\n\ndata: first\nid: 1\n\ndata:second\nid\n\ndata:  third\n\n",
			[]message{event("message", "1", "first"), event("message", "", "second"), event("message", "", " third")}},
		{"unknown fields", "datax: a\nfoo: b\nretry: 99999999999999999999\nretry: x\ndata: c\n\n", plain("c")},
		{"any bytes", "data: \x00\xff\u2028\u0085\v\f\n\n", plain("\x00\xff\u2028\u0085\v\f")},
		{"the last name counts", "event: a\nevent: b\ndata: 1\n\nevent: a\nevent\ndata: 2\n\n", []message{event("b", "", "1"), event("message", "", "2")}},
		{"a name without data is forgotten", "event: a\n\ndata: 1\n\n", plain("1")},
		{"a long name", "event: " + long + "\ndata: 1\n\n", []message{event(long[:64], "", "1")}},
		{"sticky ids", "id: 1\ndata: a\n\ndata: b\n\nid: 2\n\ndata: c\n\n", []message{event("message", "1", "a"), event("message", "1", "b"), event("message", "2", "c")}},
		{"ids with NUL", "id: 1\ndata: a\n\nid: \x002\ndata: b\n\n", []message{event("message", "1", "a"), event("message", "1", "b")}},

		{"empty lines", "\n\n\r\r\r\n\r\n", nil},
		{"no data, no event", "event: a\nid: 1\n\n", nil},
		{"cut in a line", "data: a\n\ndata: b", plain("a")},
		{"cut at the empty line", "data: a\r\n\r\ndata: b\r\n\r", plain("a", "b")},
	} {
		got, err := parsed(strings.NewReader(tc.stream))
		book := byTheBook([]byte(tc.stream))
		if want := formed(tc.want); err != io.EOF || formed(got) != want || formed(book) != want {
			t.Errorf("%s: got\n%s(%v), the reference\n%s, want\n%s", tc.name, formed(got), err, formed(book), want)
		}
	}
}

// byTheBook is the standard's algorithm as it is written there, over a whole
// stream; only names and ids are cut as ours are.
func byTheBook(stream []byte) (events []message) {
	text := strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(strings.TrimPrefix(string(stream), "\ufeff"))
	var data, name, id string
	for line := range strings.Lines(text) {
		line, whole := strings.CutSuffix(line, "\n")
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case !whole: // what has no end is discarded
		case line == "":
			if data != "" {
				events = append(events, message{cmp.Or(name[:min(len(name), 64)], "message"), id[:min(len(id), 256)], []byte(strings.TrimSuffix(data, "\n"))})
			}
			data, name = "", ""
		case field == "event":
			name = value
		case field == "data":
			data += value + "\n"
		case field == "id" && !strings.Contains(value, "\x00"):
			id = value
		}
	}
	return events
}

// choppy reads data in pieces of random sizes, as a network gives it.
type choppy struct {
	data []byte
	rng  *mathrand.Rand
}

func (c *choppy) Read(p []byte) (int, error) {
	if len(c.data) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.data[:1+c.rng.IntN(min(len(c.data), 9))])
	c.data = c.data[n:]
	return n, nil
}

// FuzzParser: however bytes are cut into reads, their events are those of the
// standard's own algorithm; and what is cut off is never dispatched.
func FuzzParser(f *testing.F) {
	f.Add([]byte("\ufeffid: 1\r\nevent: x\rdata: a\ndata\r\n\r\n:c\n\ndata:  b\n\n\rid\x00\n"), uint64(1))
	f.Add([]byte("data\n\ndata\ndata\n\ndata:"), uint64(2))
	f.Add([]byte("data: a\r\ndata: b\r\n\r\n"), uint64(12))
	f.Add([]byte("\r\n\r\rdata: \r\r\nevent\r\r\n"), uint64(3))
	f.Add([]byte(readyFrame(time.Second)+frameOf(heartbeatEvent)), uint64(4))
	f.Fuzz(func(t *testing.T, stream []byte, seed uint64) {
		want := formed(byTheBook(stream))
		for name, r := range map[string]io.Reader{
			"whole":       bytes.NewReader(stream),
			"by bytes":    iotest.OneByteReader(bytes.NewReader(stream)),
			"EOF at once": iotest.DataErrReader(bytes.NewReader(stream)),
			"in pieces":   &choppy{bytes.Clone(stream), mathrand.New(mathrand.NewPCG(seed, 0))},
		} {
			if got, err := parsed(r); err != io.EOF || formed(got) != want {
				t.Fatalf("%s:\n%s(%v), want\n%s", name, formed(got), err, want)
			}
		}
		cut := int(seed % uint64(len(stream)+1))
		if got, _ := parsed(bytes.NewReader(stream[:cut])); !strings.HasPrefix(want, formed(got)) {
			t.Fatalf("cut at %d:\n%sis not the beginning of\n%s", cut, formed(got), want)
		}
	})
}

// TestParserLineEnds: lines of CR cost what lines of LF cost, or a source could
// stop a client with few bytes by making it search its buffer for every one.
func TestParserLineEnds(t *testing.T) {
	var least [2]time.Duration // of the processor's time: whatever else runs only adds
	for range 3 {
		for i, end := range []string{"\n", "\r"} {
			p := newParser(strings.NewReader("data: " + strings.Repeat("a", 512<<10) + end + end + strings.Repeat(":"+end, 128<<10)))
			must(p.next()) // the buffer is as large from now on
			began := cpuTime()
			if _, err := p.next(); err != io.EOF {
				t.Fatal(err)
			}
			took := cpuTime() - began
			least[i] = min(cmp.Or(least[i], took), took)
		}
	}
	if lf, cr := least[0], least[1]; cr > 50*max(lf, time.Millisecond) { // to search all of the buffer takes 400 times as long
		t.Errorf("%v for lines of CR, %v for lines of LF", cr, lf)
	}
}

// The request to the target.

// passing are the statuses that are tried again by default.
var passing = []int{429, 502, 503, 504}

// clientOf is a client for target that is not run, behind no proxy of this machine.
func clientOf(t testing.TB, target string, env ...string) *Client {
	c := newClientOf(t, "http://source/subscribe/ci/", target, env...)
	c.target.Proxy = nil
	return c
}

// onWire is a request as a target gets it that writes it.
func onWire(t testing.TB, write func(io.Writer) error) recorded {
	t.Helper()
	var b bytes.Buffer
	if err := write(&b); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(&b)
	got, err := readRecorded(r)
	if err != nil || r.Buffered() > 0 {
		t.Fatalf("request does not end where it says: %v, %d bytes more", err, r.Buffered())
	}
	return got
}

// below tells whether path is prefix or below it.
func below(path, prefix string) bool { return path == prefix || strings.HasPrefix(path, prefix+"/") }

// FuzzTargetURL: whatever target a stream holds, the request goes to the
// target's host, in one request line, byte for byte below the base and the
// client's own channel. A proxy for HTTP has to be told the host (RFC 9112
// section 3.2.2); behind one for SOCKS the target itself reads the line.
func FuzzTargetURL(f *testing.F) {
	var plain, proxied []*Client
	for _, base := range []string{"http://target", "http://target/", "http://target/base/", "http://user:pass@target/a%20b/c"} {
		plain = append(plain, clientOf(f, base), clientOf(f, base, "TARGET_STRIP_PREFIX=true"), clientOf(f, base))
		plain[len(plain)-1].target.Proxy = http.ProxyURL(must(url.Parse("socks5://proxy:1080")))
		proxied = append(proxied, clientOf(f, base))
		proxied[len(proxied)-1].target.Proxy = http.ProxyURL(must(url.Parse("http://proxy:3128")))
	}
	for _, tc := range pathCases {
		for _, target := range []string{tc.path, tc.path + "?x=1;y=2&sig=%zz", "http://evil/webhooks/ci" + tc.path, "/webhooks/ci" + tc.path + "?x"} {
			f.Add(target)
		}
	}
	for _, target := range []string{
		"//evil/x", "//\xe9/x?\xff", "//a|b[c]\"^`{}#%41?#", "//x?", "///evil", "http://evil//evil/x", "/\\evil", "/@evil/", "http:evil", "//evil:80/../x", "/x?//evil",
		"https://evil", "/x#frag", "/%2f%2fevil/x", "/;//evil", "http://a\nb/webhooks/ci/x", // the authority goes, and must be one all the same
	} {
		f.Add(target)
	}
	f.Fuzz(func(t *testing.T, target string) {
		data := appendLatin1([]byte("POST "), target)
		w, err := decodeWebhook("ci", "a", append(data, " HTTP/1.1\nContent-Length: 0\n\n"...))
		data, _ = json.Marshal(map[string]string{"originalUrl": string(appendLatin1(nil, target))})
		if legacy, err2 := decodeLegacy("ci", data); (err == nil) != (err2 == nil) || err == nil && (legacy.Path != w.Path || legacy.Query != w.Query) {
			t.Fatalf("%q is %+v, %v in one form and %+v, %v in the other", target, w, err, legacy, err2)
		}
		if err != nil {
			return
		}
		for i, c := range slices.Concat(plain, proxied) {
			want := c.requestTarget(w)
			req := c.targetRequest(t.Context(), w, want)
			write, before := req.Write, ""
			if i >= len(plain) {
				write, before = req.WriteProxy, "http://target"
			}
			got := onWire(t, write)
			line := strings.Split(got.line, " ")
			if req.URL.Scheme+"://"+req.URL.Host != "http://target" || got.get("Host") != "target" || len(line) != 3 || line[0] != "POST" || line[2] != "HTTP/1.1" {
				t.Fatalf("%q goes to %q as %q, Host %q", target, req.URL, got.line, got.get("Host"))
			}
			if strings.HasPrefix(want, "//") { // no relay sends this: it may be spelled otherwise
				want = "/" + strings.TrimPrefix(line[1], "/")
			}
			if line[1] != before+want {
				t.Fatalf("%q: request target %q, want %q", target, line[1], before+want)
			}
			path, _, _ := strings.Cut(want, "?")
			if !confined(c.base, "/"+strings.TrimPrefix(strings.TrimPrefix(path, c.base), "/")) || !below(path, c.base+"/webhooks/ci") && !c.opts.StripPrefix {
				t.Fatalf("%q: %q leaves %q", target, want, c.base)
			}
		}
	})
}

// TestTargetRequest is what a target sees beside method, path and body:
// nothing is invented, and nothing of the first hop stays.
func TestTargetRequest(t *testing.T) {
	for _, tc := range []struct{ name, target, method, lines, body, line, want string }{
		{"least", "http://target:8080/base", "POST", "", "x", "POST /base/x", "Host: target:8080\nContent-Length: 1"},
		{"no body", "http://target", "GET", "", "", "GET /x", "Host: target"},
		{"POST without a body", "http://target/base//", "POST", "", "", "POST /base/x", "Host: target\nContent-Length: 0"},
		{"escaped base", "http://target/a%2Fb%20c", "DELETE", "", "", "DELETE /a%2Fb%20c/x", "Host: target"},
		{"the original host", "http://target", "GET", "Host: hooks.example.com", "", "GET /x", "Host: target\nX-Forwarded-Host: hooks.example.com"},
		{"of a proxy before", "http://target", "GET", "Host: relay\nX-Forwarded-Host: hooks.example.com", "", "GET /x", "Host: target\nX-Forwarded-Host: hooks.example.com"},
		{"what the provider sent", "http://target", "PUT", "User-Agent: U\nAccept-Encoding: br\nContent-Type: a/b\nX-Dup: 1\nX-Dup: 2\nX-Latin: \xe9\xff", "\x00",
			"PUT /x", "Host: target\nUser-Agent: U\nContent-Length: 1\nAccept-Encoding: br\nContent-Type: a/b\nX-Dup: 1\nX-Dup: 2\nX-Latin: \xe9\xff"},
		{"several user agents", "http://target", "GET", "User-Agent: a\nUser-Agent: b", "", "GET /x", "Host: target\nUser-Agent: a\nUser-Agent: b"},
		{"an empty user agent", "http://target", "GET", "User-Agent:", "", "GET /x", "Host: target\nUser-Agent: "},
		{"first hop's framing", "http://target", "POST",
			"Transfer-Encoding: chunked\nContent-Length: 99\nExpect: 100-continue\nTE: trailers\nTrailer: X\nConnection: X-Hop\nX-Hop: 1\nKeep-Alive: x\nUpgrade: h2c",
			"ab", "POST /x", "Host: target\nContent-Length: 2"},
		{"forged names of the relay", "http://target", "GET", "X-Relay-Event-Id: forged\nX-Relay-Client: x", "", "GET /x", "Host: target"},
		{"credentials of the base", "http://user:p%40ss@target", "GET", "", "", "GET /x", "Host: target\nAuthorization: Basic dXNlcjpwQHNz"},
		{"credentials of the provider", "http://user:pass@target", "GET", "Authorization: Bearer t", "", "GET /x", "Host: target\nAuthorization: Bearer t"},
	} {
		c := clientOf(t, tc.target)
		w := &Webhook{ID: "id-1", Method: tc.method, Path: "/x", Body: []byte(tc.body), Headers: endToEnd(headersOf(tc.lines))}
		for range 2 { // every attempt builds the same
			got := onWire(t, c.targetRequest(t.Context(), w, c.base+w.Path).Write)
			lines, want := []string{got.line}, append(strings.Split(tc.want, "\n"), "X-Relay-Event-Id: id-1", tc.line+" HTTP/1.1")
			for _, h := range got.headers {
				lines = append(lines, textproto.CanonicalMIMEHeaderKey(h[0])+": "+h[1])
			}
			slices.Sort(lines)
			slices.Sort(want)
			if string(got.body) != tc.body || !slices.Equal(lines, want) {
				t.Errorf("%s:\n%q\n%q, want\n%q\n%q", tc.name, lines, got.body, want, tc.body)
			}
		}
	}
}

// TestRedirect: only a 307 or 308 that stays on scheme, host, port and below
// the base is followed; any other is the provider's to see.
func TestRedirect(t *testing.T) {
	check := func(base, location, want string) {
		c := clientOf(t, base)
		for status, want := range map[int]string{301: "", 302: "", 303: "", 307: want, 308: want, 200: ""} {
			resp := &http.Response{StatusCode: status, Header: http.Header{"Location": {location}}}
			if got, ok := c.redirect(resp, c.base+"/hook/x?a=1"); ok != (want != "") || got != want {
				t.Errorf("%d from %s to %q: %q, %v, want %q", status, base, location, got, ok, want)
			}
		}
	}
	for _, tc := range []struct{ base, location, want string }{
		{"http://target/base", "http://target:80/base/y?b", "/base/y?b"},
		{"https://target:443/base", "https://target/base/y", "/base/y"},
		{"http://target/base", "HTTP://TARGET/base/y", "/base/y"},
		{"http://[::1]:8080/base", "http://[::1]:8080/base/y", "/base/y"},
		{"http://target/base", "/base/y//z%2F?b=%zz", "/base/y//z%2F?b=%zz"},
		{"http://target/base", "/base", "/base"},
		{"http://target/base", "y", "/base/hook/y"},
		{"http://target/base", "../y/./z", "/base/y/z"},
		{"http://target/base", "/base/y#f", "/base/y"},
		{"http://target/base", "?b", "/base/hook/x?b"},
		{"http://target/base", "//target/base/y", "/base/y"},
		{"http://target", "http://target//evil/y", "//evil/y"},
		{"http://target:443/base", "https://target:443/base/y", ""},
	} {
		check(tc.base, tc.location, tc.want)
	}
	for _, location := range []string{
		"http://evil/base/y", "http://target@evil/base/y", "http://target.evil/base/y", "//evil/base/y", "http://target:81/base/y", "https://target/base/y",
		"http:base/y", "mailto:x", "", "/other", "/baseball", "../../other", "/base/../other", "/base/%2e%2e/other", "/base/..%2fother", "/base/..;/other", "/base/..\\other",
		"/%62ase/y", "/base/\x01", "/base/%zz", "/base/y?a b HTTP/1.1",
	} {
		check("http://target/base", location, "")
	}
}

// A client in a bubble.

// world is a client between a source and a target, in a bubble.
type world struct {
	*Client
	t              *testing.T
	options        ClientOptions
	log            *logBuffer
	source, target *pipes
	feeds          chan *outlet // the streams that the client opens
	stop           func()       // SIGTERM, and the wait for the end

	mu sync.Mutex

	// Guarded by mu: requests to the target, with reports, and to subscribe; and what
	// answers them instead of 200, 204 and a stream.
	calls, said, began        []call
	respond, reply, subscribe answerer
}

type call struct {
	id, method, uri, body string
	at                    time.Time
}

// answerer answers the n-th request, from 1.
type answerer func(rw http.ResponseWriter, r *http.Request, n int)

// script answers the n-th request as its n-th part says, and what comes later as
// the last: with a status, which the value of a field may follow, with 200 after some
// time, with silence, or with a connection that breaks. The body is an event, which only
// a stream may bring.
func script(parts string) answerer {
	list := strings.Split(parts, "; ")
	return func(rw http.ResponseWriter, r *http.Request, n int) {
		word, value, _ := strings.Cut(list[min(n, len(list))-1], " ")
		takes, err := time.ParseDuration(word)
		switch {
		case word == "break":
			panic(http.ErrAbortHandler)
		case word == "silence":
			<-r.Context().Done()
		case err == nil:
			sleep(r.Context(), takes)
		default:
			for _, name := range []string{"Location", "Retry-After", "Content-Type"} { // the status says which
				rw.Header().Set(name, value)
			}
			rw.WriteHeader(must(strconv.Atoi(word)))
			io.WriteString(rw, hook("unasked"))
		}
	}
}

// bytewise answers with start, and then with piece for ever, after a pause each.
func bytewise(start, piece string, pause time.Duration) answerer {
	if pause == 0 {
		piece = strings.Repeat(piece, 4096)
	}
	return func(rw http.ResponseWriter, _ *http.Request, _ int) {
		conn, _, _ := http.NewResponseController(rw).Hijack()
		defer conn.Close()
		_, err := io.WriteString(conn, start)
		for err == nil && piece != "" {
			time.Sleep(pause)
			_, err = io.WriteString(conn, piece)
		}
	}
}

// inWorld runs test with a world that it has to start, in a subtest if that has a name.
func inWorld(t *testing.T, name string, test func(*testing.T, *world)) {
	bubble := func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			test(t, &world{
				t: t, log: &logBuffer{}, source: newPipes(), target: newPipes(), feeds: make(chan *outlet, 1000),
				options: ClientOptions{
					Source: must(url.Parse("http://source/subscribe/ci/")), Token: "secret", ReconnectInterval: time.Second, HandlerTimeout: 10 * time.Second,
					Target: must(url.Parse("http://target/base")), Timeout: 30 * time.Second, RetryWindow: time.Minute, Concurrency: 32, RetryOn: passing,
				},
			})
		})
	}
	if name == "" {
		bubble(t)
	} else {
		t.Run(name, bubble)
	}
}

// start runs the client until the test ends.
func (w *world) start() {
	w.Client = NewClient(w.options, newLogger(&Config{LogLevel: slog.LevelDebug}, w.log))
	for transport, p := range map[*http.Transport]*pipes{w.Client.source: w.source, w.Client.target: w.target} {
		transport.DialContext, transport.Proxy = p.dial, nil
	}
	serveOn(w.t, &http.Server{Handler: w.serve(&w.calls, &w.respond, script("200"))}, w.target)
	source := http.NewServeMux()
	source.Handle("POST "+strings.TrimSuffix(w.options.Source.EscapedPath(), "/")+"/responses", w.serve(&w.said, &w.reply, script("204")))
	source.Handle("GET /", w.serve(&w.began, &w.subscribe, w.stream))
	serveOn(w.t, &http.Server{Handler: source}, w.source)
	w.t.Cleanup(func() {
		if w.t.Failed() {
			w.t.Logf("log:\n%s", w.log)
		}
	})
	w.stop = running(w.t, w.Client.Run)
}

// serve notes each request in list, and answers it as answer says, or else as usual.
func (w *world) serve(list *[]call, answer *answerer, usual answerer) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if list != &w.calls && (r.Header.Get("X-Auth-Token") != "secret" || r.Header.Get("X-Relay-Client") == "") {
			w.t.Errorf("%s %s without token or name", r.Method, r.URL)
		}
		body, _ := io.ReadAll(r.Body)
		w.mu.Lock()
		*list = append(*list, call{r.Header.Get("X-Relay-Event-Id"), r.Method, r.RequestURI, string(body), time.Now()})
		n, answer := len(*list), *answer
		w.mu.Unlock()
		if answer == nil {
			answer = usual
		}
		answer(rw, r, n)
	})
}

// outlet is one stream, which its test writes and closes.
type outlet struct {
	net.Conn
	gone chan struct{} // closed when the client has left it
	turn chan struct{} // to write: in a bubble, a wait for the mutex of a pipe would stop the clock
	at   time.Time
}

func (w *world) stream(rw http.ResponseWriter, r *http.Request, _ int) {
	h := r.Header
	if r.RequestURI != w.options.Source.RequestURI() || h.Get("Accept") != "text/event-stream" || h.Get("X-Relay-Features") != features[1] || h["Last-Event-Id"] != nil {
		w.t.Errorf("subscribes to %s with %q", r.URL, r.Header)
	}
	conn, _, _ := http.NewResponseController(rw).Hijack()
	f := &outlet{conn, make(chan struct{}), make(chan struct{}, 1), time.Now()}
	go func() { // ends with the connection
		defer close(f.gone)
		io.Copy(io.Discard, f)
	}()
	f.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n")
	w.feeds <- f
}

// send is one write. It waits while the client does not read, and fails once it has gone.
func (f *outlet) send(parts ...string) error {
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	_, err := io.WriteString(f, strings.Join(parts, ""))
	return err
}

// next is the next stream that the client opens.
func (w *world) next() *outlet {
	w.t.Helper()
	select {
	case f := <-w.feeds:
		return f
	case <-time.After(time.Hour):
		w.t.Fatal("the client opens no stream")
		return nil
	}
}

// ready is the next stream, ready and with a heartbeat every five seconds.
func (w *world) ready() *outlet {
	w.t.Helper()
	f := w.next()
	if err := f.send(readyFrame(5 * time.Second)); err != nil {
		w.t.Fatal(err)
	}
	go func() { // ends with the stream
		for f.send(frameOf(heartbeatEvent)) == nil {
			select {
			case <-time.After(5 * time.Second):
			case <-f.gone:
			}
		}
	}()
	synctest.Wait()
	return f
}

// begin is the ready stream of a client that starts.
func (w *world) begin() *outlet {
	w.t.Helper()
	w.start()
	return w.ready()
}

// change makes something else answer from now on.
func (w *world) change(answer *answerer, to answerer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*answer = to
}

// got is what has come so far of calls, said or began.
func (w *world) got(list *[]call) []call {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(*list)
}

// is checks whether the client is ready.
func (w *world) is(ready bool) {
	w.t.Helper()
	synctest.Wait()
	if err := w.Check(w.t.Context()); (err == nil) != ready {
		w.t.Errorf("ready: %v, want %v", err, ready)
	}
}

// until lets time pass until ok.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	for range 100_000 {
		if synctest.Wait(); ok() {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	w.t.Fatalf("never: %s", what)
}

// ids is the events that reached the target, in order.
func (w *world) ids() (ids []string) {
	for _, c := range w.got(&w.calls) {
		ids = append(ids, c.id)
	}
	return ids
}

// arrives waits until these events have reached the target, in this order and no others.
func (w *world) arrives(want ...string) {
	w.t.Helper()
	w.until(fmt.Sprintf("%q at the target", want), func() bool { return len(w.ids()) >= len(want) })
	if got := w.ids(); !slices.Equal(got, want) {
		w.t.Errorf("forwarded %q, want %q", got, want)
	}
}

// told is one report.
type told struct {
	id string
	Answer
	at time.Time
}

// told is all reports so far, in their order, as net/http alone reads them.
func (w *world) told() (list []told) {
	for _, request := range w.got(&w.said) {
		r := bufio.NewReader(strings.NewReader(request.body))
		for _, err := r.Peek(1); err == nil; _, err = r.Peek(1) {
			resp := must(http.ReadResponse(r, nil))
			a := Answer{Status: resp.StatusCode, Body: must(io.ReadAll(resp.Body)), Err: resp.Header.Get("X-Relay-Error")}
			list = append(list, told{resp.Header.Get("X-Relay-Event-Id"), a, request.at})
		}
	}
	return list
}

// answer is the only report on the only event that was sent, and its request.
func (w *world) answer() (told, call) {
	w.t.Helper()
	w.until("a report", func() bool { return len(w.got(&w.said)) > 0 })
	time.Sleep(time.Minute)
	list := w.told()
	if len(list) != 1 || len(w.got(&w.said)) != 1 {
		w.t.Fatalf("reports %+v", list)
	}
	return list[0], w.got(&w.said)[0]
}

// asking is the frame of an event whose sender waits so long, as change would have it.
func asking(id string, timeout time.Duration, change ...func(*Webhook)) string {
	w := &Webhook{ID: id, Method: "POST", Path: "/webhooks/ci/x", Query: "?a=1", Body: []byte("body of " + id), Time: time.Now(), Mode: modeAccept, Timeout: timeout}
	if timeout > 0 {
		w.Mode = modeResponse
	}
	for _, f := range change {
		f(w)
	}
	return frameOf(eventOf("ci", w))
}

// hook is the frame of an event for which nobody waits.
func hook(id string) string { return asking(id, 0) }

// legacy is an event of a legacy server.
const legacy = `data: {"originalUrl":"/webhooks/ci/x","body":"","headers":{}}` + "\n\n"

// at fails unless d is within 50 milliseconds of want: what memory and pipes
// add to a time is nothing in a bubble.
func at(t *testing.T, what string, d, want time.Duration) {
	t.Helper()
	between(t, what, want, d, want+50*time.Millisecond)
}

// TestWatchdog: a stream that goes silent is cut after two heartbeats, a second
// and one more look, and one that never becomes ready after its own time.
func TestWatchdog(t *testing.T) {
	for name, tc := range map[string]struct {
		begin string // of the stream
		bytes int    // that it sends later, one every ten seconds
		want  time.Duration
	}{
		"five seconds":                   {readyFrame(5 * time.Second), 0, 11 * time.Second},
		"one second":                     {readyFrame(time.Second), 0, 3 * time.Second},
		"no interval":                    {"event: ready\ndata: {}\n\n", 0, silenceDefault},
		"not a number":                   {"event: ready\ndata: {\"heartbeatInterval\":\"5000\"}\n\n", 0, silenceDefault},
		"tiny":                           {"event: ready\ndata: {\"heartbeatInterval\":0.001}\n\n", 0, silenceDefault},
		"huge":                           {"event: ready\ndata: {\"heartbeatInterval\":1e300}\n\n", 0, silenceDefault},
		"a second ready changes nothing": {readyFrame(5*time.Second) + readyFrame(time.Minute), 0, 11 * time.Second},
		"any byte keeps it open":         {readyFrame(5 * time.Second), 30, 11 * time.Second},
		"never ready":                    {": hello\n\nevent: heartbeat\ndata: {}\n\n", 0, readyTimeout},
	} {
		inWorld(t, name, func(t *testing.T, w *world) {
			w.start()
			f := w.next()
			f.send(tc.begin)
			last := time.Now()
			for range tc.bytes {
				time.Sleep(10 * time.Second)
				f.send(":\n")
				w.is(true)
				last = time.Now()
			}
			<-f.gone
			at(t, "cut", time.Since(last), tc.want+lookAgain)
			w.is(false)
			w.ready()
			w.is(true)
		})
	}
}

// TestWatchdogWhileFull: a client that is full does not read, and must not
// take its own silence for the source's.
func TestWatchdogWhileFull(t *testing.T) {
	ready := readyFrame(5 * time.Second)
	for name, parts := range map[string][]string{
		"ready comes alone":      {ready, hook("1"), hook("2"), hook("3"), hook("4")},
		"events come with ready": {ready + hook("1") + hook("2") + hook("3"), hook("4")},
	} {
		inWorld(t, name, func(t *testing.T, w *world) {
			release := make(chan struct{})
			w.respond = func(http.ResponseWriter, *http.Request, int) { <-release }
			w.options.Concurrency, w.options.Timeout = 1, time.Hour
			w.start()
			f := w.next()
			go func() {
				for _, part := range parts { // a pipe holds nothing: this waits
					f.send(part)
				}
			}()
			time.Sleep(10 * time.Minute)
			w.arrives("1")
			w.is(false)
			if streams, taken := len(w.got(&w.began)), w.Events.Load(); streams != 1 || taken > 2 {
				t.Errorf("%d streams, %d events taken while it is full", streams, taken)
			}
			close(release)
			w.arrives("1", "2", "3", "4")
			sent := time.Now()
			<-f.gone // and from now on it watches again
			between(t, "cut", 0, time.Since(sent), 12*time.Second)
		})
	}
}

// TestReconnectBackoff: pauses are jittered, grow to their longest, and only ready makes
// them short again. After a stream that lasted there is none. What a stream says of ids
// and of retry changes nothing, and the log tells times in whole milliseconds.
func TestReconnectBackoff(t *testing.T) {
	inWorld(t, "", func(t *testing.T, w *world) {
		const initial = 1500 * time.Millisecond
		w.options.ReconnectInterval = initial
		w.subscribe = script(strings.Repeat("503; 200 text/event-stream; ", 6)) // open, but not ready: no reason for haste either
		w.start()
		w.until("twelve tries", func() bool { return len(w.got(&w.began)) == 12 })
		w.change(&w.subscribe, nil)
		f := w.ready()
		tries := w.got(&w.began)
		var shares []float64
		for n, line := range w.log.lines("no stream from the source") {
			pause, longest := tries[n+1].at.Sub(tries[n].at), min(initial<<n, reconnectMax)
			between(t, "another try", longest/2, pause, longest)
			if line["again"] != float64(pause.Milliseconds()) {
				t.Errorf("a pause of %v is logged as %v", pause, line["again"])
			}
			shares = append(shares, float64(pause)/float64(longest))
		}
		if len(shares) != 12 || slices.Max(shares)-slices.Min(shares) < 0.05 {
			t.Errorf("pauses are %v of the longest: no jitter", shares)
		}
		f.send("retry: 600000\nid: last\ndata\n\n")
		time.Sleep(streamLasts)
		f.Close()
		ended := time.Now()
		f = w.ready()
		at(t, "another stream", f.at.Sub(ended), 0)
		f.send("retry: 0\n\n")
		time.Sleep(streamLasts - time.Millisecond)
		f.Close()
		ended = time.Now()
		f = w.ready()
		between(t, "another stream", initial/2, f.at.Sub(ended), initial)
		if n, lines := w.Reconnects.Load(), w.log.lines("stream ended"); n != 2 || len(lines) != 2 || lines[0]["age"] != 1000. || lines[1]["age"] != 999. {
			t.Errorf("%d reconnects counted, want those of the streams that were ready; logged %v", n, lines)
		}
	})
}

// TestHints: what keeps a client from its source or its target is told with what
// may mend it, and counted by its kind.
func TestHints(t *testing.T) {
	answering := func(status int) string {
		return newSource(t, func(_ int, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }).URL
	}
	secure := func(certificate *tls.Certificate, set func(*tls.Config)) string {
		s := newTLSServer(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(418) })
		s.TLS.Certificates = []tls.Certificate{*certificate}
		set(s.TLS)
		return s.URL
	}
	issue := func(address string, end time.Duration) (pair *tls.Certificate, ca string) {
		pair = (*authority)(nil).pair(t, func(c *x509.Certificate) {
			c.IPAddresses, c.ExtKeyUsage, c.NotAfter = []net.IP{net.ParseIP(address)}, nil, time.Now().Add(end)
		})
		return pair, writePEM(t, "CERTIFICATE", pair.Certificate[0])
	}
	good, goodCA := issue("127.0.0.1", time.Minute)
	other, otherCA := issue("192.0.2.1", time.Minute)
	old, oldCA := issue("127.0.0.1", -time.Minute)
	asIs := func(*tls.Config) {}
	tooOld := func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }
	strict := func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert }
	down := "http://" + nobody
	alert := newSource(t, func(_ int, w http.ResponseWriter, _ *http.Request) { // a TLS port that does not speak HTTP even then
		conn, _, _ := http.NewResponseController(w).Hijack()
		io.WriteString(conn, "\x15\x03\x01\x00\x02\x02\x46")
		conn.Close()
	}).URL
	const lost, refused = "is this a relay's /subscribe/{channel}? (SOURCE_URL)", "the other side refused the handshake: tls: "
	const unknown = "nobody known vouches for the certificate: name its CA in CA_FILE"
	for _, tt := range []struct{ name, url, ca, reason, hint string }{
		{"404", answering(404), "", "path", lost},
		{"a page", answering(200), "", "path", lost},
		{"401", answering(401), "", "token", "AUTH_TOKEN is missing, or is not one that the source takes for this channel"},
		{"403", answering(403), "", "address", "the source does not take streams from this address (SUBSCRIBE_ALLOWED_IPS)"},
		{"503", answering(503), "", "busy", "the source is full, is shutting down or has lost its Redis"},
		{"unknown CA", secure(good, asIs), "", "tls", unknown},
		{"another host", secure(other, asIs), otherCA, "tls", "the certificate is for another host name than the URL has"},
		{"expired", secure(old, asIs), oldCA, "tls", "the certificate has expired or is not valid yet: renew it, or set this machine's clock"},
		{"plain port", strings.Replace(answering(404), "http:", "https:", 1), "", "tls", "no TLS is spoken there: is it http:// instead of https://?"},
		{"too old", secure(good, tooOld), goodCA, "tls", refused + "protocol version not supported"},
		{"wants a certificate", secure(good, strict), goodCA, "status", ""}, // and gets it
		{"TLS port", strings.Replace(secure(good, asIs), "https:", "http:", 1), "", "status", "does the source want https? (SOURCE_URL)"},
		{"TLS port of others", alert, "", "connection", "what is spoken there is no HTTP: is it https:// instead of http://?"},
		{"no such host", "http://no..where", "", "connection", "no such host: check the URL"}, // which no name server is asked for
		{"down", down, "", "connection", ""},
		{"unknown CA of a target", secure(good, asIs), "", "of a target", unknown},
		{"target that wants a certificate", secure(good, strict), goodCA, "of a target", refused + "certificate required"}, // which is for the source alone
		{"target that is down", down, "", "of a target", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			source, message, level := tt.url, "no stream from the source", "WARN"
			if tt.reason == "token" || tt.reason == "address" {
				level = "ERROR"
			}
			if tt.reason == "of a target" {
				source, message, level = steady(t, legacy).URL, "webhook given up", "ERROR"
			}
			config := configOf(t, "RELAY_MODE=client", "SOURCE_URL="+source+"/subscribe/ci", "TARGET_BASE_URL="+tt.url, "RECONNECT_INTERVAL=1h", "TARGET_RETRY_WINDOW=0", "CA_FILE="+tt.ca)
			options, said := config.clientOf(config.Sources[0]), &logBuffer{}
			options.Certificate = func() (*tls.Certificate, error) { return good, nil }
			c := NewClient(options, newLogger(&Config{}, said))
			c.source.Proxy, c.target.Proxy = nil, nil
			running(t, c.Run)
			eventually(t, message, func() bool { return len(said.lines(message)) > 0 })
			line := said.lines(message)[0]
			if hint, _ := line["hint"].(string); hint != tt.hint || line["level"] != level || line["err"] == nil {
				t.Errorf("said %v, want %s with the hint %q", line, level, tt.hint)
			}
			counters, reason := c.Denied, tt.reason
			if reason == "of a target" {
				counters, reason = c.Forwards, answerUnreachable
			}
			if counters[reason].Load() != 1 || total(counters) != 1 {
				t.Errorf("%d are counted for %s, of %d", counters[reason].Load(), reason, total(counters))
			}
		})
	}
}

// TestReconnectForEver: nothing that a source says ends the client, which comes back
// after at most 5 seconds, or 30 when the source says that the client is at fault.
func TestReconnectForEver(t *testing.T) {
	for name, tc := range map[string]struct {
		source, reason string
		least, most    int // tries in ten minutes
	}{
		"200 with HTML":         {"200 text/html", "path", 100, 200},
		"200 without a type":    {"200", "path", 100, 200},
		"202 with a stream":     {"202 text/event-stream", "status", 15, 60},
		"301":                   {"301 http://evil/subscribe/ci/", "status", 15, 60},
		"307":                   {"307 /subscribe/other/", "status", 15, 60},
		"429":                   {"429 86400", "status", 15, 60},
		"500":                   {"500", "status", 100, 200},
		"closes without answer": {"break", "connection", 100, 200},
		"nobody listens":        {"", "connection", 100, 200},
		"says nothing":          {"silence", "silent", 20, 28}, // for readyTimeout each
	} {
		inWorld(t, name, func(t *testing.T, w *world) {
			w.subscribe = script(tc.source)
			w.source.cut(tc.source == "")
			w.start()
			time.Sleep(10 * time.Minute)
			lines, asked := w.log.lines("no stream from the source"), len(w.got(&w.began))
			n := len(lines)
			if n < tc.least || n > tc.most || asked > n+1 {
				t.Fatalf("%d tries with %d requests in ten minutes, want %d to %d, and no redirect followed", n, asked, tc.least, tc.most)
			}
			silent := lines[0]["hint"] == "a proxy may be buffering the stream: turn that off for /subscribe/"
			if counted := w.Denied[tc.reason].Load(); int(counted) != n || int(total(w.Denied)) != n || silent != (tc.reason == "silent") {
				t.Errorf("%d are counted for %s, of %d; said %v", counted, tc.reason, total(w.Denied), lines[0])
			}
			if got := w.ids(); got != nil || w.log.lines("stream ready") != nil {
				t.Errorf("took %q from what is no stream", got)
			}
			w.is(false)
			if err := w.Alive(t.Context()); err != nil {
				t.Error(err)
			}
			w.change(&w.subscribe, nil)
			w.source.cut(false)
			w.ready().send(hook("last"))
			w.arrives("last")
		})
	}
}

// TestClientDrain: a stream that its source asks to leave is replaced before it ends.
func TestClientDrain(t *testing.T) {
	drain := frameOf(drainEvent)
	// The first stream is read to the end that the source makes; what comes on both is forwarded once.
	inWorld(t, "make before break", func(t *testing.T, w *world) {
		first := w.begin()
		time.Sleep(5 * time.Second)
		first.send(drain)
		second := w.next()
		at(t, "second stream", time.Since(first.at), 5*time.Second)
		first.send(drain, drain) // asking again opens no third
		time.Sleep(5 * time.Second)
		first.send(hook("before"))
		w.arrives("before")
		second.send(readyFrame(5*time.Second), hook("both"))
		w.is(true)
		time.Sleep(4 * time.Second)
		first.send(hook("both"), hook("after"))
		w.arrives("before", "both", "after")
		if isClosed(first.gone) {
			t.Error("the first stream was left")
		}
		first.Close()
		second.send(hook("alone"), drain) // and once more: drain is for every stream
		third := w.next()
		second.Close() // which is no reason for a fourth
		time.Sleep(5 * time.Second)
		third.send(readyFrame(5*time.Second), hook("last"))
		w.arrives("before", "both", "after", "alone", "last")
		if n := len(w.got(&w.began)); n != 3 || w.Duplicates.Load() != 1 || w.Reconnects.Load() != 1 {
			t.Errorf("%d streams, %d duplicates, %d reconnects", n, w.Duplicates.Load(), w.Reconnects.Load())
		}
	})
	// It stays the one there is while no other comes up, and when it ends only a new one counts.
	inWorld(t, "without a successor", func(t *testing.T, w *world) {
		first := w.begin()
		w.change(&w.subscribe, script("503"))
		first.send(drain)
		time.Sleep(5 * time.Minute)
		first.send(hook("first"))
		w.arrives("first")
		w.is(true)
		if n := len(w.got(&w.began)); n < 50 || n > 100 {
			t.Errorf("%d tries in five minutes", n)
		}
		w.change(&w.subscribe, nil)
		ended := time.Now()
		first.Close()
		w.is(false)
		last := w.ready()
		at(t, "the next stream", last.at.Sub(ended), 0)
		last.send(hook("last"))
		w.arrives("first", "last")
	})
	// A source that asks for it as soon as a stream is ready gets no more of them than one that cuts them.
	inWorld(t, "at once", func(t *testing.T, w *world) {
		w.subscribe = func(rw http.ResponseWriter, r *http.Request, _ int) {
			tell(rw, readyFrame(5*time.Second), drain)
			<-r.Context().Done()
		}
		w.start()
		time.Sleep(10 * time.Second)
		if n := len(w.got(&w.began)); n > 25 || n < 2 {
			t.Errorf("%d streams in ten seconds", n)
		}
	})
	// With one forward at a time what comes over the new stream waits for the old one's end.
	inWorld(t, "in order", func(t *testing.T, w *world) {
		w.options.Concurrency = 1
		w.respond = script("5s")
		first := w.begin()
		first.send(hook("1"), drain, hook("2"))
		go func() { // the backlog of a client that is full
			first.send(hook("3"))
			first.send(hook("4"))
			first.send(hook("5"))
			first.Close()
		}()
		second := w.ready()
		go second.send(hook("4"), hook("5"), hook("6"))
		w.arrives("1", "2", "3", "4", "5", "6")
	})
	// A source that goes on writing is left in the end.
	inWorld(t, "without an end", func(t *testing.T, w *world) {
		first := w.begin()
		first.send(drain)
		w.ready()
		moved := time.Now()
		<-first.gone
		at(t, "first stream left", time.Since(moved), leaveTime)
		w.is(true)
		if n := len(w.got(&w.began)); n != 2 || w.Reconnects.Load() != 0 {
			t.Errorf("%d streams, %d reconnects", n, w.Reconnects.Load())
		}
	})
}

// TestClientShutdown: at SIGTERM the client takes nothing more, says what it
// will still report, finishes that, and abandons it only when its time is over.
func TestClientShutdown(t *testing.T) {
	for _, tc := range []struct {
		name, target string
		want         time.Duration
		reports      []string // what is wrong with the answer
	}{
		{"idle target", "200", 0, []string{""}},
		{"slow target", "8s", 8 * time.Second, []string{answerTaken, ""}},
		{"a target that needs another try", "503; 200", retryInitial, []string{answerTaken, ""}},
		{"stuck target", "silence", 10 * time.Second, []string{answerTaken}},
	} {
		inWorld(t, tc.name, func(t *testing.T, w *world) {
			w.respond = script(tc.target)
			f := w.begin()
			f.send(asking("1", time.Minute))
			synctest.Wait()
			began := time.Now()
			go w.stop()
			synctest.Wait()
			if !isClosed(f.gone) {
				t.Error("the stream stays open")
			}
			w.stop()
			between(t, "ended", tc.want/2, time.Since(began), tc.want)
			var got []string
			for _, one := range w.told() {
				got = append(got, one.Err)
			}
			if n := len(w.got(&w.began)); !slices.Equal(got, tc.reports) || n != 1 {
				t.Errorf("reports %q, want %q; %d streams", got, tc.reports, n)
			}
			ctx, cancel := context.WithTimeout(context.Background(), checkTimeout)
			defer cancel()
			if w.Check(ctx) == nil || w.Alive(ctx) == nil {
				t.Error("ready or alive after the end")
			}
		})
	}
	// What waits for a free slot was not reported and is left to the next client; a legacy server's webhooks
	// nobody else gets, so they are forwarded while the handler timeout lasts.
	for takes, want := range map[string]int{"100ms": 20, "1s": 10} {
		inWorld(t, "others wait "+takes, func(t *testing.T, w *world) {
			w.options.Concurrency = 1
			w.respond = script(takes)
			w.begin().send(hook("first"), strings.Repeat(legacy, 19), hook("accepted"), asking("held", time.Minute))
			time.Sleep(50 * time.Millisecond)
			began := time.Now()
			w.stop()
			between(t, "ended", 0, time.Since(began), w.options.HandlerTimeout)
			if n := len(w.ids()); n < want || slices.Contains(w.ids(), "held") || slices.Contains(w.ids(), "accepted") {
				t.Errorf("%q reached the target, want %d", w.ids(), want)
			}
			if list := w.told(); len(list) != 1 || list[0].id != "first" || list[0].Status != 202 {
				t.Errorf("reported %+v", list)
			}
		})
	}
}

// TestRetries: what is worth another try, when it comes, what is final, and where a
// redirect leads. The sender waits for two minutes, so that its report shows the end.
func TestRetries(t *testing.T) {
	const whole = 2 * time.Minute
	const window = whole - 500*time.Millisecond // the rest is for the report
	const many = -1                             // attempts: more than ten
	for _, tc := range []struct {
		name, target string
		down         time.Duration // for which nobody listens
		attempts     int           // how many reach the target
		status       int           // what is reported
		err          string        // likewise
		least, most  time.Duration // until the report
	}{
		{"200", "200", 0, 1, 200, "", 0, 0},
		{"408", "408", 0, 1, 408, "", 0, 0},
		{"500", "500", 0, 1, 500, "", 0, 0},
		{"each that passes", "429; 502; 503; 504; 204", 0, 5, 204, "", retryInitial * 11 / 2, retryInitial * 11}, // pauses of 1, 2, 4 and 4
		{"until the last moment", "503", 0, many, 503, "", window - retryHeld, window},
		{"Retry-After in seconds", "429 17; 200", 0, 2, 200, "", 17 * time.Second, 17 * time.Second},
		{"Retry-After as a date", "503 Sat, 01 Jan 2000 00:00:42 GMT; 200", 0, 2, 200, "", 41 * time.Second, 42 * time.Second},
		{"Retry-After beyond the window", "503 120; 200", 0, 1, 503, "", 0, 0},
		{"Retry-After beyond all numbers", "503 99999999999999999999; 200", 0, 2, 200, "", retryInitial / 2, retryInitial},
		{"Retry-After of a final answer", "400 17; 200", 0, 1, 400, "", 0, 0},
		{"redirects", "307 /base/other; 308 /base/other; 200", 0, 3, 200, "", 0, 0},
		{"the most redirects", strings.Repeat("308 /base/other; ", redirectLimit) + "200", 0, redirectLimit + 1, 200, "", 0, 0},
		{"too many redirects", "307 /base/other", 0, redirectLimit + 1, 502, answerUnreachable, 0, 0},
		{"silence", "silence", 0, 4, 504, answerTimeout, window - retryHeld, window},
		{"silence after a status", "503; silence", 0, 5, 503, "", window - retryHeld, window},
		{"a status after silence", "silence; 502", 0, many, 502, "", window - retryHeld, window},
		{"connections that break", "break", 0, many, 502, answerUnreachable, window - retryHeld, window},
		{"silence after a connection that broke", "break; silence", 0, 5, 502, answerUnreachable, window - retryHeld, window},
		{"nobody listens", "200", time.Hour, 0, 502, answerUnreachable, window - retryHeld, window},
		{"comes up late", "200", time.Minute, 1, 200, "", time.Minute - time.Second, time.Minute + retryHeld},
	} {
		inWorld(t, tc.name, func(t *testing.T, w *world) {
			w.respond = script(tc.target)
			f := w.begin()
			if tc.down > 0 {
				w.target.cut(true)
				time.AfterFunc(tc.down, func() { w.target.cut(false) })
			}
			sent := time.Now()
			f.send(asking("1", whole))
			a, _ := w.answer()
			if a.Status != tc.status || a.Err != tc.err {
				t.Errorf("reported %+v, want %d %q", a, tc.status, tc.err)
			}
			between(t, "reported", tc.least, a.at.Sub(sent), tc.most)
			told := 0
			for _, line := range w.log.lines("webhook given up") { // says why what is told was told
				told++
				if why, _ := line["err"].(string); strings.Contains(why, "deadline exceeded") != (tc.err == answerTimeout) {
					t.Errorf("given up because of %q", why)
				}
			}
			if tc.err != "" && told != 1 {
				t.Errorf("given up %d times", told)
			}
			calls := w.got(&w.calls)
			if n := len(calls); n != tc.attempts && !(tc.attempts == many && n > 10) {
				t.Errorf("%d attempts, want %d", n, tc.attempts)
			}
			for i, c := range calls { // which repeat the request as it was
				want := call{"1", "POST", "/base/webhooks/ci/x?a=1", "body of 1", c.at}
				if i > 0 && strings.Contains(tc.target, "/base/other") {
					want.uri = "/base/other"
				}
				if c != want {
					t.Errorf("attempt %+v, want %+v", c, want)
				}
			}
		})
	}
}

// TestRetryWindow: without a sender that waits, the window is the setting's. It begins
// with the first attempt: an event that had to wait for its turn is not worth less.
func TestRetryWindow(t *testing.T) {
	for window, attempts := range map[time.Duration][2]int{0: {1, 1}, time.Second: {2, 4}, time.Minute: {8, 20}} {
		inWorld(t, window.String(), func(t *testing.T, w *world) {
			w.respond = script("503")
			w.options.RetryWindow = window
			w.begin().send(hook("1"))
			w.until("giving up", func() bool { return len(w.log.lines("webhook given up")) == 1 })
			calls, again := w.got(&w.calls), w.log.lines("webhook will be forwarded again")
			if n := len(calls); n < attempts[0] || n > attempts[1] || w.Retries.Load() != int64(n-1) || len(again) != n-1 {
				t.Fatalf("%d attempts, %d retries counted, %d logged, want %v", n, w.Retries.Load(), len(again), attempts)
			}
			took := calls[len(calls)-1].at.Sub(calls[0].at)
			between(t, "the last attempt", 0, took, window)
			ms, _ := w.log.lines("webhook given up")[0]["ms"].(float64)
			between(t, "given up", took-time.Millisecond, time.Duration(ms*1e6), took)
			for i, line := range again {
				if pause := calls[i+1].at.Sub(calls[i].at); line["wait"] != float64(pause.Milliseconds()) {
					t.Errorf("a pause of %v is logged as %v", pause, line["wait"])
				}
			}
		})
	}
	inWorld(t, "of one that waited", func(t *testing.T, w *world) {
		w.respond = script("20s; 503; 200")
		w.options.Concurrency, w.options.RetryWindow = 1, 10*time.Second
		w.begin().send(hook("1"), hook("2"))
		w.arrives("1", "2", "2")
	})
}

// TestConcurrency: so many forwards at once and no more; one keeps the order.
func TestConcurrency(t *testing.T) {
	for _, limit := range []int{1, 3} {
		inWorld(t, strconv.Itoa(limit), func(t *testing.T, w *world) {
			var now, most atomic.Int32
			w.respond = func(rw http.ResponseWriter, _ *http.Request, n int) {
				most.Store(max(most.Load(), now.Add(1)))
				defer now.Add(-1)
				time.Sleep(time.Duration(n%3) * time.Second)
				if n == 4 {
					rw.WriteHeader(503) // whoever comes later still waits
				}
			}
			w.options.Concurrency = limit
			f := w.begin()
			go f.send(hook("0"), hook("1"), hook("2"), hook("3"), hook("4"), hook("5"), hook("6"), hook("7"), hook("8"), hook("9"))
			w.until("all", func() bool { return total(w.Forwards) == 10 })
			if got := strings.Join(w.ids(), " "); int(most.Load()) != limit || limit == 1 && got != "0 1 2 3 3 4 5 6 7 8 9" {
				t.Errorf("%d at once, forwarded %s", most.Load(), got)
			}
		})
	}
}

// TestDuplicates: an id is forwarded once; what was reported is reported again, from memory.
func TestDuplicates(t *testing.T) {
	inWorld(t, "", func(t *testing.T, w *world) {
		w.respond = func(rw http.ResponseWriter, _ *http.Request, n int) {
			time.Sleep(time.Second)
			rw.WriteHeader(410 + n)
		}
		f := w.begin()
		f.send(hook("a"))
		synctest.Wait()
		f.send(hook("a"), asking("b", time.Minute), asking("b", time.Minute)) // while both are under way
		time.Sleep(2 * time.Second)
		f.send(hook("a"), asking("b", 30*time.Second))
		time.Sleep(2 * time.Second)
		w.arrives("a", "b")
		var told []string
		for _, one := range w.told() {
			told = append(told, fmt.Sprintf("%s %d", one.id, one.Status))
		}
		slices.Sort(told)
		if got := strings.Join(told, ", "); got != "a 202, a 202, a 202, b 412, b 412" || w.Duplicates.Load() != 4 {
			t.Errorf("reported %q, %d duplicates", got, w.Duplicates.Load())
		}
		f.send("id: 7\n"+legacy, "id: 7\n"+legacy) // ids of a legacy server count per stream: these are two webhooks
		time.Sleep(2 * time.Second)
		if got := w.ids(); len(got) != 4 || got[2] == got[3] || len(got[2]) < 26 {
			t.Errorf("forwarded %q", got)
		}
	})
}

// TestClientReports: a report is repeated while its failure may pass and its event has
// time, and no longer. It goes below the stream's own URL, whatever that is.
func TestClientReports(t *testing.T) {
	const many, time30 = -1, 30 * time.Second // reports: more than five
	for _, tc := range []struct {
		name, source string
		reports      int
		counted      int64
		least, most  time.Duration // until the last one
	}{
		{"taken", "204", 1, 1, 0, 0},
		{"no such page, for a while", "404; 404; 204", 3, 1, retryInitial * 3 / 2, retryInitial * 3},
		{"wrong token", "401", many, 0, time30 - 2*retryHeld, time30},
		{"refused", "400", 1, 0, 0, 0},
		{"passing failures", "503; 502; 500; 504; 429; 204", 6, 1, retryInitial * 15 / 2, retryInitial * 15},
		{"failing to the end", "503", many, 0, time30 - 2*retryHeld, time30},
		{"connection broken", "break; break; 204", 3, 1, retryInitial * 3 / 2, retryInitial * 3},
		{"silence", "silence; 204", 2, 1, reportTimeout + retryInitial/2, reportTimeout + retryInitial},
	} {
		inWorld(t, tc.name, func(t *testing.T, w *world) {
			w.options.Source = must(url.Parse("http://source/a%2Fb/subscribe/ci?tenant=a%2Fb"))
			w.reply = script(tc.source)
			f := w.begin()
			sent := time.Now()
			f.send(asking("id-1", time30))
			time.Sleep(5 * time.Minute)
			w.arrives("id-1")
			reports := w.got(&w.said)
			if n := len(reports); n != tc.reports && !(tc.reports == many && n > 5) || w.Reports.Load() != tc.counted {
				t.Fatalf("%d reports, %d counted, want %d and %d", n, w.Reports.Load(), tc.reports, tc.counted)
			}
			between(t, "the last report", tc.least, reports[len(reports)-1].at.Sub(sent), tc.most)
			for _, r := range reports {
				if r.uri != "/a%2Fb/subscribe/ci/responses?tenant=a%2Fb" || r.body != reports[0].body {
					t.Errorf("report %+v", r)
				}
			}
		})
	}
}

// TestReportsTravelTogether: while reports are on their way, those that come
// meanwhile go into the next request: never more than a few requests at a time,
// however slow the source is, and fewer of them than reports.
func TestReportsTravelTogether(t *testing.T) {
	for _, tc := range []struct {
		name   string
		events int
		takes  time.Duration // what the source takes for one request
		body   int           // of the target's answers
		most   int           // requests
	}{
		{"slow source", 300, 500 * time.Millisecond, 0, 2 * reportsAtOnce},
		{"large answers", 90, 500 * time.Millisecond, 100 << 10, reportsAtOnce + 90/9},
		{"largest answers", 20, 10 * time.Millisecond, answerLimit, 20},
	} {
		inWorld(t, tc.name, func(t *testing.T, w *world) {
			var now, most atomic.Int32
			w.reply = func(http.ResponseWriter, *http.Request, int) {
				most.Store(max(most.Load(), now.Add(1)))
				defer now.Add(-1)
				time.Sleep(tc.takes)
			}
			w.respond = func(rw http.ResponseWriter, _ *http.Request, _ int) { rw.Write(make([]byte, tc.body)) }
			w.options.Concurrency = tc.events
			f := w.begin()
			for n := range tc.events {
				f.send(asking(strconv.Itoa(n), time.Minute))
			}
			w.until("all are reported", func() bool { return int(w.Reports.Load()) == tc.events })
			requests, times := w.got(&w.said), map[string]int{}
			for _, one := range w.told() {
				if times[one.id]++; one.Status != 200 || len(one.Body) != tc.body {
					t.Fatalf("reported %d and %d bytes on %q", one.Status, len(one.Body), one.id)
				}
			}
			for _, r := range requests {
				if n := strings.Count(r.body, "X-Relay-Event-Id"); n > 1 && len(r.body) > reportBatch {
					t.Errorf("%d reports of %d bytes in one request", n, len(r.body))
				}
			}
			if n := len(requests); n > tc.most || most.Load() > reportsAtOnce || len(times) != tc.events || len(w.told()) != tc.events {
				t.Errorf("%d requests, %d at a time, want %d; %d reports on %d events", n, most.Load(), tc.most, len(w.told()), len(times))
			}
		})
	}
	// Each is given up when its own sender's time is over, and not before.
	inWorld(t, "two in one request", func(t *testing.T, w *world) {
		w.reply = script("503")
		f := w.begin()
		f.send(asking("short", 5*time.Second), asking("long", 30*time.Second))
		time.Sleep(20 * time.Second)
		w.change(&w.reply, nil)
		w.until("the other one is taken", func() bool { return w.Reports.Load() == 1 })
		last := map[string]time.Duration{}
		for _, one := range w.told() {
			last[one.id] = one.at.Sub(f.at)
		}
		between(t, "short was last reported", 3*time.Second, last["short"], 5*time.Second)
		between(t, "long was last reported", 20*time.Second, last["long"], 20*time.Second+retryHeld)
		if given := w.log.lines("report given up"); len(given) != 1 || given[0]["event"] != "short" {
			t.Errorf("given up: %v", given)
		}
	})
}

// How old events are.

// aging is clocks in a bubble.
type aging struct {
	*clocks
	t *testing.T
}

func inAging(t *testing.T, name string, test func(*aging)) {
	t.Run(name, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { test(&aging{&clocks{began: time.Now()}, t}) })
	})
}

// seems is how old an event is found to be that is so old by the clock of its
// replica, whose offset to ours is skew.
func (a *aging) seems(replica string, age, skew time.Duration) time.Duration {
	return a.age(&Webhook{ID: newID(replica), Time: time.Now().Add(skew - age)})
}

// is checks that to a tenth of a second.
func (a *aging) is(replica string, age, skew, want time.Duration) {
	a.t.Helper()
	if got := a.seems(replica, age, skew); (got - want).Abs() > 100*time.Millisecond {
		a.t.Errorf("%v old by a clock that is %v before ours: found %v, want %v", age, skew, got, want)
	}
}

// TestClocks: the age of an event is found although every replica has a clock
// of its own, and drifts.
func TestClocks(t *testing.T) {
	names := make([]string, clocksLimit+10)
	for i := range names {
		names[i] = newReplica()
	}
	one := names[0]
	inAging(t, "skew", func(a *aging) {
		skews := []time.Duration{0, time.Hour, -time.Hour, -20 * time.Second, 10 * 365 * 24 * time.Hour}
		for i, skew := range skews {
			a.is(names[i], 0, skew, 0)
			time.Sleep(time.Second)
			a.is(names[i], 7*time.Second, skew, 7*time.Second)
			a.is(names[i], 0, skew, 0)
		}
		a.is(one, -time.Minute, 0, 0)
		a.is(one, 0, 0, time.Minute) // the youngest is the measure
		last := names[len(names)-1]
		a.is(last, 5*time.Second, time.Hour, 0) // nobody can know better
		a.is(last, time.Second, time.Hour, 0)
		a.is(last, 5*time.Second, time.Hour, 4*time.Second)
	})
	for _, rate := range []float64{100e-6, -100e-6} { // more than any quartz
		inAging(t, fmt.Sprint("drift ", rate), func(a *aging) {
			drift := func() time.Duration { return time.Duration(rate * float64(time.Since(a.began))) }
			for time.Since(a.began) < 24*time.Hour {
				a.is(one, 0, drift(), 0)
				time.Sleep(10 * time.Second)
				a.is(one, 3*time.Second, drift(), 3*time.Second)
			}
		})
	}
	inAging(t, "windows", func(a *aging) {
		a.is(one, 0, 0, 0)
		time.Sleep(ageWindow + time.Second)
		a.is(one, 4*time.Second, 0, 4*time.Second) // the first of a window
		a.is(one, 5*time.Second, 0, 5*time.Second)
		// The replica's clock is set back: its events look old, but not for long.
		var last time.Duration
		for began := time.Now(); time.Since(began) < 2*ageWindow+time.Minute; time.Sleep(time.Second) {
			if a.seems(one, 0, -time.Minute) > 0 {
				last = time.Since(began)
			}
		}
		if last > 2*ageWindow+2*time.Second {
			a.t.Errorf("events look old for %v after the clock was set", last)
		}
		a.is(one, 0, time.Hour, 0) // and forth: they never do
		a.is(one, 2*time.Second, time.Hour, 2*time.Second)
	})
	inAging(t, "a source that makes up replicas", func(a *aging) {
		for range 100 {
			for _, name := range names {
				a.is(name, 0, 0, 0)
			}
			if len(a.offset) > clocksLimit {
				a.t.Fatalf("%d clocks are kept", len(a.offset))
			}
			a.age(&Webhook{ID: "x", Time: time.Unix(0, 0)})
			a.age(&Webhook{ID: "y", Time: time.UnixMilli(1 << 62)}) // wherever that is
		}
		a.is(names[len(names)-1], time.Second, 0, time.Second)
	})
}

// TestOverdue: an event whose sender has been answered is not forwarded, nor
// reported; one that is late is given what is left; one for which nobody waits
// is never too old.
func TestOverdue(t *testing.T) {
	inWorld(t, "", func(t *testing.T, w *world) {
		w.respond = script("200; 200; silence; 200")
		f := w.begin()
		send := func(id string, age, timeout time.Duration) {
			f.send(asking(id, timeout, func(w *Webhook) { w.Time = w.Time.Add(time.Hour - age) })) // a replica whose clock is an hour ahead
			synctest.Wait()
		}
		send("fresh", 0, 9*time.Second)
		send("over", 9001*time.Millisecond, 9*time.Second)
		send("nobody", 9001*time.Millisecond, 0)
		if n := w.Overdue.Load(); n != 1 || len(w.log.lines("event is over, its sender has been answered")) != 1 {
			t.Errorf("%d events are counted", n)
		}
		sent := time.Now()
		send("late", 5*time.Second, 9*time.Second)
		w.until("three reports", func() bool { return w.Reports.Load() == 3 })
		late := w.told()[2]
		if late.id != "late" || late.Err != answerTimeout {
			t.Errorf("reported %+v", late)
		}
		at(t, "reported", late.at.Sub(sent), 3500*time.Millisecond)
		send("over", time.Second, 9*time.Second) // in time now: the server gave it to us once more
		w.arrives("fresh", "nobody", "late", "over")
	})
}

// TestTargetConnectionReuse: webhooks in short succession share a connection, and an
// idle one is closed before the target does that, which would meet the next webhook.
func TestTargetConnectionReuse(t *testing.T) {
	inWorld(t, "", func(t *testing.T, w *world) {
		f := w.begin()
		const early, late = reuseTimeout - 100*time.Millisecond, reuseTimeout + 100*time.Millisecond
		var dialled []int
		for n, pause := range []time.Duration{early, early, late, 0} {
			f.send(hook(strconv.Itoa(n)))
			synctest.Wait()
			dialled = append(dialled, len(w.target.open))
			time.Sleep(pause)
		}
		if want := []int{1, 1, 1, 2}; !slices.Equal(dialled, want) {
			t.Errorf("connections after each webhook: %v, want %v", dialled, want)
		}
	})
}

// TestAnswers is what of a target's answer a provider may see.
func TestAnswers(t *testing.T) {
	const of, empty = "\nX-Relay-Event-Id: 1", "\nX-Relay-Event-Id: 1\nContent-Length: 0"
	most, large := strconv.Itoa(answerLimit), strings.Repeat("a", answerLimit+1)
	more := strconv.Itoa(len(large))
	for _, tc := range []struct {
		name, mode, answer, body string // of the target
		want, told               string // of the report
	}{
		{"response", modeResponse, "1.1 201 Created\nContent-Type: text/plain\nX-Dup: 1\nX-Dup: 2\nConnection: X-Hop\nX-Hop: 1\nKeep-Alive: x\nX-Relay-Client: x\nContent-Length: 5",
			"hi\r\n\xc3", "1.1 201 Created\nContent-Length: 5\nContent-Type: text/plain\nX-Dup: 1\nX-Dup: 2" + of, "hi\r\n\xc3"},
		{"status", modeStatus, "1.1 201 Created\nContent-Type: text/plain\nContent-Length: 2", "hi", "1.1 201 Created" + empty, ""},
		{"chunked", modeResponse, "1.1 200 OK\nTransfer-Encoding: chunked", "2\r\nhi\r\n0\r\n\r\n", "1.1 200 OK\nContent-Length: 2" + of, "hi"},
		{"without a length", modeResponse, "1.0 200 OK", "hi", "1.1 200 OK\nContent-Length: 2" + of, "hi"},
		{"empty", modeResponse, "1.1 204 No Content", "", "1.1 204 No Content" + of, ""},
		{"compressed", modeResponse, "1.1 200 OK\nContent-Encoding: gzip\nContent-Length: 4", "abcd", "1.1 200 OK\nContent-Length: 4\nContent-Encoding: gzip" + of, "abcd"},
		{"as large as may be", modeResponse, "1.1 200 OK\nContent-Length: " + most, large[1:], "1.1 200 OK\nContent-Length: " + most + of, large[1:]},
		{"too large", modeResponse, "1.1 200 OK\nX-A: b\nContent-Length: " + more, large, "1.1 200 OK\nX-A: b" + empty, ""},
		{"too large and nobody reads it", modeStatus, "1.1 200 OK\nContent-Length: " + more, large, "1.1 200 OK" + empty, ""},
		{"names that are no tokens", modeResponse, "1.1 200 OK\nX-A : b\nContent-Length: 2", "hi", "1.1 200 OK\nContent-Length: 2" + of, "hi"},
	} {
		inWorld(t, tc.name, func(t *testing.T, w *world) {
			crlf := strings.NewReplacer("\n", "\r\n")
			w.respond = bytewise("HTTP/"+crlf.Replace(tc.answer+"\n\n")+tc.body, "", 0)
			w.begin().send(asking("1", 9*time.Second, func(w *Webhook) { w.Mode = tc.mode }))
			if _, report := w.answer(); report.body != "HTTP/"+crlf.Replace(tc.want+"\n\n")+tc.told {
				t.Errorf("reported %.200q, want %.200q and %.20q", report.body, tc.want, tc.told)
			}
		})
	}
}

// TestHostileTarget: whatever stands at the target costs a bounded amount for
// a bounded time, and the client lives on.
func TestHostileTarget(t *testing.T) {
	const head, chunked, slow = "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", time.Second
	for _, tc := range []struct {
		name, mode   string
		start, piece string        // it answers with start, and with piece for ever
		pause        time.Duration // before each piece
		status       int
		err          string
		heard        bool // it has the webhook: another try would deliver it twice
	}{
		{"endless body that nobody waits for", modeStatus, head + "\r\n", "a", 0, 200, "", false},
		{"trickling body that nobody waits for", modeStatus, head + "\r\n", "a", slow, 200, "", false},
		{"endless body", modeResponse, head + "\r\n", "a", 0, 200, "", false},
		{"endless chunks", modeResponse, chunked, "1\r\na\r\n", 0, 200, "", false},
		{"endless trailer", modeResponse, chunked + "0\r\n", "X-A: b\r\n", 0, 502, answerUnreachable, true},
		{"endless header", modeResponse, head, "X-A: b\r\n", 0, 502, answerUnreachable, false},
		{"endless 1xx", modeResponse, "", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", 0, 502, answerUnreachable, false},
		{"trickling body", modeResponse, head + "\r\n", "a", slow, 504, answerTimeout, true},
		{"trickling header", modeResponse, head, "X-A: b\r\n", slow, 504, answerTimeout, false},
		{"redirect loop", modeResponse, "HTTP/1.1 307 x\r\nConnection: close\r\nLocation: /base/x\r\nContent-Length: 0\r\n\r\n", "", 0, 502, answerUnreachable, true},
		{"redirect with an endless body", modeResponse, "HTTP/1.1 308 x\r\nLocation: /base/x\r\n\r\n", "a", 0, 502, answerUnreachable, true},
		{"redirect with a trickling body", modeResponse, "HTTP/1.1 307 x\r\nLocation: /base/good\r\nContent-Length: 100\r\n\r\n", "a", slow, 200, "", false},
		{"redirect elsewhere", modeResponse, "HTTP/1.1 307 x\r\nLocation: http://evil/base/x\r\nContent-Length: 0\r\n\r\n", "", 0, 307, "", false},
		{"switching protocols", modeResponse, "HTTP/1.1 101 x\r\nUpgrade: evil\r\nConnection: Upgrade\r\n\r\n", "", 0, 502, answerUnreachable, true},
		{"status above", modeResponse, "HTTP/1.1 999 x\r\nContent-Length: 0\r\n\r\n", "", 0, 502, answerUnreachable, true},
		{"no HTTP", modeResponse, "\x00\xff" + canary + "\r\n\r\n", "", 0, 502, answerUnreachable, false},
		{"NUL in a header", modeResponse, head + "X-A: " + canary + "\x00\r\n\r\n", "", 0, 502, answerUnreachable, false},
		{"a body cut short", modeResponse, head + "Content-Length: 10\r\n\r\nabc", "", 0, 502, answerUnreachable, true},
		{"a failure cut short", modeResponse, "HTTP/1.1 503 x\r\nContent-Length: 10\r\n\r\nabc", "", 0, 503, "", false},
	} {
		inWorld(t, tc.name, func(t *testing.T, w *world) {
			hostile := bytewise(tc.start, tc.piece, tc.pause)
			w.respond = func(rw http.ResponseWriter, r *http.Request, n int) {
				if r.URL.Path == "/base/good" || r.Header.Get("X-Relay-Event-Id") == "after" {
					return
				}
				hostile(rw, r, n)
			}
			w.options.Timeout = 3 * time.Second
			f := w.begin()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			sent := time.Now()
			f.send(asking("1", 9*time.Second, func(w *Webhook) { w.Mode = tc.mode }))
			a, report := w.answer()
			runtime.ReadMemStats(&after)
			mib, n := (after.TotalAlloc-before.TotalAlloc)>>20, len(w.ids())
			if a.Status != tc.status || a.Err != tc.err || len(report.body) > 64<<10 || mib > 32 || tc.heard && n > redirectLimit+1 {
				t.Errorf("reported %+v in %d bytes after %d requests, %d MiB were allocated, want %d %q", a, len(report.body), n, mib, tc.status, tc.err)
			}
			between(t, "reported", 0, report.at.Sub(sent), map[string]time.Duration{modeStatus: time.Second, modeResponse: 9 * time.Second}[tc.mode])
			f.send(hook("after"))
			w.until("a webhook after it", func() bool { return slices.Contains(w.ids(), "after") })
			if strings.Contains(w.log.String(), canary) {
				t.Error("the log quotes the target")
			}
		})
	}
}

// TestHostileStream: whatever a source sends, the client stays within its bounds
// and keeps nothing of it, and the next good event is forwarded.
func TestHostileStream(t *testing.T) {
	large := strings.Repeat("a", 1<<20)
	for _, tc := range []struct {
		name, piece string
		repeat      int   // 0: until the client ends the stream
		invalid     int64 // events refused
	}{
		{"endless line", large, 0, 0},
		{"endless event", "data:" + large + "\n", 0, 0},
		{"tiny events", strings.Repeat("data:x\n\n", 4096), 4, 4 * 4096},
		{"large events", "data:" + strings.Repeat(large, 4) + "\n\n", 8, 8},
		{"empty lines", strings.Repeat("\n", 64<<10), 16, 0},
		{"comments", strings.Repeat(":\r", 64<<10), 8, 0},
		{"bad JSON", "data: {\n\ndata: null\n\ndata: []\n\ndata: {\"originalUrl\":5}\n\n" + strings.Replace(legacy, "{}", `{"a":"b\r\nc: d"}`, 1), 1, 5},
		{"no HTTP", "event: webhook\ndata: {}\n\nevent: webhook\ndata\n\nevent: webhook\ndata\ndata\ndata\n\n", 1, 3},
		{"large heads", "event: webhook\ndata: " + large + "\n\n", 32, 32},
		{"large heads of fields", httpBlock("1", "POST /webhooks/ci/x HTTP/1.1\n"+strings.Repeat("A: b\n", 200_000), ""), 8, 8},
		{"split fields", httpBlock("1", "POST /webhooks/ci/x HTTP/1.1\nA: b\x00\n", "") + httpBlock("1", "POST /webhooks/ci/x HTTP/1.1\nA\x00: b\n", ""), 1, 2},
		{"ids for paths", httpBlock("../../other", "POST /webhooks/ci/x HTTP/1.1\nX-Relay-Respond: status; timeout=9000\n", "") + "id\n\n", 1, 1},
	} {
		inWorld(t, tc.name, func(t *testing.T, w *world) {
			f := w.begin()
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			var err error
			sent := 0
			for n := 0; err == nil && (n < tc.repeat || tc.repeat == 0 && sent < 2*lineLimit); n++ {
				err = f.send(tc.piece)
				sent += len(tc.piece)
			}
			if tc.repeat == 0 {
				if sent > lineLimit+8<<20 {
					t.Fatalf("the client took %d MiB", sent>>20)
				}
				f = w.ready()
			} else if err != nil {
				t.Fatalf("the client left the stream: %v", err)
			}
			f.send(hook("after"))
			w.arrives("after")
			if n, logged := w.Invalid.Load(), len(w.log.lines("event refused")); n != tc.invalid || logged != min(int(n), hushLines) {
				t.Errorf("%d events refused, %d logged, want %d", n, logged, tc.invalid)
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			mib, stay := (after.TotalAlloc-before.TotalAlloc)>>20, int64(after.HeapAlloc-before.HeapAlloc)
			if mib > 32+10*uint64(sent>>20) || stay > 3*keepBuffer {
				t.Errorf("%d MiB were allocated for %d, %d KiB stay", mib, sent>>20, stay>>10)
			}
		})
	}
}

// TestMemory: ids are remembered within bounds of count, bytes and age, the
// oldest forgotten first.
func TestMemory(t *testing.T) {
	remember := func(m *memory, ids string, n int, body []byte) (answers []weak.Pointer[Answer]) {
		for i := range n {
			a := &Answer{Status: 200, Body: body, Headers: []Header{{"A", []string{strings.Repeat("b", 1000)}}}}
			m.begin(ids+strconv.Itoa(i), modeStatus)
			m.finish(ids+strconv.Itoa(i), a)
			answers = append(answers, weak.Make(a))
		}
		return answers
	}
	check := func(m *memory, forgotten string, known ...string) {
		t.Helper()
		bytes := 0
		for _, e := range m.entries {
			bytes += e.size
		}
		if bytes != m.bytes || len(m.order) > memoryEvents || m.bytes > memoryBytes {
			t.Errorf("%d entries, %d in order, %d bytes, %d counted", len(m.entries), len(m.order), bytes, m.bytes)
		}
		for _, id := range append(known, forgotten) {
			if (m.entries[id] != nil) != (id != forgotten) {
				t.Errorf("%q is known: %v", id, id == forgotten)
			}
		}
	}
	synctest.Test(t, func(t *testing.T) {
		m := &memory{}
		begins := func(id string, first, taken bool, status int) {
			t.Helper()
			if f, tk, a := m.begin(id, modeStatus); f != first || tk != taken || (a == nil) != (status == 0) || a != nil && a.Status != status {
				t.Errorf("first %v, taken %v, answer %+v, want %v, %v and %d", f, tk, a, first, taken, status)
			}
		}
		begins("a", true, false, 0)
		begins("a", false, false, 0) // waits for a slot
		if told := false; !m.take("a", func() { told = true }) || !told {
			t.Error("not taken")
		}
		begins("a", false, true, 0)
		m.finish("a", &Answer{Status: 201})
		m.finish("a", &Answer{Status: 500})
		m.finish("b", &Answer{Status: 500}) // forgotten meanwhile
		begins("a", false, true, 201)
		begins("c", true, false, 0)
		m.forget("c")
		begins("c", true, false, 0)
		check(m, "b", "a", "c")

		m = &memory{} // bounded by count
		m.begin("under way", modeStatus)
		remember(m, "", memoryEvents+100, nil)
		check(m, "99", "under way", "100", strconv.Itoa(memoryEvents+99))

		m = &memory{} // by bytes
		m.begin("under way", modeStatus)
		remember(m, "small", 2000, nil) // so many that the queue of ids has space to hide in
		answers := remember(m, "large", 40, make([]byte, 1<<20))
		check(m, "large24", "under way", "large25", "large39")
		runtime.GC()
		for i, a := range answers { // what is forgotten is freed
			if (a.Value() != nil) != (i > 24) {
				t.Errorf("large%d is held: %v", i, a.Value() != nil)
			}
		}
		runtime.KeepAlive(m)

		m = &memory{} // by age
		remember(m, "old", 1, nil)
		time.Sleep(memoryAge/3 + time.Second)
		remember(m, "young", 1, nil)
		time.Sleep(memoryAge * 2 / 3)
		remember(m, "new", 1, nil)
		check(m, "old0", "young0", "new0")
	})
}

// Benchmarks.

// pushStream is n push events as they come over the network, in bursts.
func pushStream(n int) []byte { return bytes.Repeat(block(eventOf("github", pushHook()).chunk), n) }

// lines is the least that a reader of events must do: find the lines.
func lines(data []byte, each func(line []byte)) {
	r := bufio.NewReaderSize(bytes.NewReader(data), 64<<10)
	for line, err := r.ReadSlice('\n'); err == nil; line, err = r.ReadSlice('\n') {
		each(line)
	}
}

// BenchmarkParse: events of 10 KiB off a stream, beside bufio finding their lines.
func BenchmarkParse(b *testing.B) {
	const n = 500
	data := pushStream(n)
	duel(b, "event", n, func() {
		p := newParser(bytes.NewReader(data))
		for range n {
			must(p.next())
		}
	}, func() { lines(data, func([]byte) {}) })
}

// BenchmarkReceive: from the stream to a webhook, beside encoding/json alone
// on lines that bufio finds.
func BenchmarkReceive(b *testing.B) {
	const n = 100
	data := pushStream(n)
	duel(b, "event", n, func() {
		p := newParser(bytes.NewReader(data))
		for range n {
			m := must(p.next())
			must(decodeWebhook("github", m.id, m.data))
		}
	}, func() {
		lines(data, func(line []byte) {
			if rest, ok := bytes.CutPrefix(line, []byte("data: ")); ok {
				var plain plainHook
				json.Unmarshal(rest, &plain)
			}
		})
	})
}
