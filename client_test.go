package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
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

// formed is events in a form that compares.
func formed(events []message) string {
	var b strings.Builder
	for _, m := range events {
		fmt.Fprintf(&b, "%q %q %q\n", m.name, m.id, m.data)
	}
	return b.String()
}

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
		{"CR", "data: a\r\rdata: b\r\r", plain("a", "b")},
		{"CRLF", "id: 1\r\ndata: a\r\ndata: b\r\n\r\n", []message{event("message", "1", "a\nb")}},
		{"all three", "data: a\r\rdata: b\r\n\ndata: c\n\r\n", plain("a", "b", "c")},
		{"LF CR is two ends", "data: a\n\rdata: b\n\n", plain("a", "b")},
		{"CR CRLF is two ends", "data: a\r\r\ndata: b\n\n", plain("a", "b")},

		{"byte order mark", "\ufeffdata: a\n\n", plain("a")},
		{"one byte order mark", "\ufeff\ufeffdata: a\n\ndata: b\n\n", plain("b")},
		{"a later byte order mark", "\n\ufeffdata: a\n\n", nil},
		{"half a byte order mark", "\xef\xbbdata: a\n\ndata: b\n\n", plain("b")},
		{"byte order mark alone", "\ufeff\ndata: a\n\n", plain("a")},

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
		{"cut behind a line", "data: a\n\ndata: b\n", plain("a")},
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

// FuzzParser: the same bytes give the same events however they are cut into
// reads, those of the standard's own algorithm; and what is cut off is never
// dispatched.
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

// TestParserBounds: a source that never ends a line or an event costs about
// twice the limit, and no more of it is read.
func TestParserBounds(t *testing.T) {
	const more = 16 // MiB
	for _, piece := range []string{strings.Repeat("a", 1<<20), "data:" + strings.Repeat("a", 1<<20) + "\n"} {
		var pieces []io.Reader // one for each read
		for range lineLimit>>20 + more {
			pieces = append(pieces, strings.NewReader(piece))
		}
		source := io.MultiReader(pieces...)
		p := newParser(source)
		_, err := p.next()
		left, _ := io.Copy(io.Discard, source)
		if buffers := cap(p.buf) + cap(p.data); err != errTooLong || left < more/2<<20 || buffers > 2*lineLimit+32<<20 {
			t.Errorf("%.9q…: %v; %d MiB were left, buffers have %d MiB", piece, err, left>>20, buffers>>20)
		}
	}
}

// TestParserShrinks: one large event must not keep its buffers for ever.
func TestParserShrinks(t *testing.T) {
	small := "data: x\n\n"
	p := newParser(io.MultiReader(strings.NewReader("data: "+strings.Repeat("a", 4<<20)+"\n\n"), strings.NewReader(small), strings.NewReader(small)))
	for _, want := range []int{4 << 20, 1, 1} {
		if m, err := p.next(); err != nil || len(m.data) != want {
			t.Fatalf("%d bytes of data, %v, want %d", len(m.data), err, want)
		}
	}
	if cap(p.buf) > keepBuffer || cap(p.data) > keepBuffer {
		t.Errorf("buffers of %d and %d bytes stay", cap(p.buf), cap(p.data))
	}
}

// TestParserLineEnds: lines of CR cost what lines of LF cost, or a source could
// stop a client with few bytes by making it search its buffer for every one.
func TestParserLineEnds(t *testing.T) {
	took := func(end string) time.Duration {
		large := "data: " + strings.Repeat("a", 512<<10) + end + end // the buffer is as large from now on
		p := newParser(strings.NewReader(large + strings.Repeat(":"+end, 128<<10)))
		must(p.next())
		began := time.Now()
		if _, err := p.next(); err != io.EOF {
			t.Fatal(err)
		}
		return time.Since(began)
	}
	lf, cr := took("\n"), took("\r")
	for range 5 { // whatever else runs on this machine only adds
		if cr <= 50*lf { // to search the buffer each time costs a thousand times as much
			return
		}
		lf, cr = min(lf, took("\n")), min(cr, took("\r"))
	}
	t.Errorf("%v for lines of CR, %v for lines of LF", cr, lf)
}

// The request to the target.

// passing are the statuses that are tried again by default.
var passing = []int{429, 502, 503, 504}

// clientOf is a client for target that is not run. No proxy of this machine is
// before it.
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
		{"http://target/base", "http://target/base/y?b", "/base/y?b"},
		{"http://target/base", "http://target:80/base/y", "/base/y"},
		{"https://target:443/base", "https://target/base/y", "/base/y"},
		{"http://target/base", "HTTP://TARGET/base/y", "/base/y"},
		{"http://[::1]:8080/base", "http://[::1]:8080/base/y", "/base/y"},
		{"http://target/base", "/base/y//z%2F?b=%zz", "/base/y//z%2F?b=%zz"},
		{"http://target/base", "/base", "/base"},
		{"http://target/base", "y", "/base/hook/y"},
		{"http://target/base", "../y/./z", "/base/y/z"},
		{"http://target/base", "/base/y#f", "/base/y"},
		{"http://target/base", "?b", "/base/hook/x?b"},
		{"http://target", "/anywhere", "/anywhere"},
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

// refuse makes dialling fail, or no more; connections stay.
func (p *pipes) refuse(down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = down
}

// world is a client between a source and a target, in a bubble.
type world struct {
	*Client
	t              *testing.T
	options        ClientOptions
	log            *logBuffer
	source, target *pipes

	respond func(rw http.ResponseWriter, r *http.Request, n int) // answers the n-th request to the target; nil: 200
	reply   func(n int) int                                      // the status for the n-th report; nil: 204

	feeds    chan *outlet
	finished chan struct{} // Run has returned
	sigterm  context.CancelFunc

	mu    sync.Mutex
	calls []call           // guarded by mu: requests to the target
	said  []said           // guarded by mu: reports
	began []time.Time      // guarded by mu: requests to subscribe
	other http.HandlerFunc // guarded by mu: answers them with something else; nil: with a stream
}

type call struct {
	id, method, uri, body string
	at                    time.Time
}

type said struct {
	uri, body string
	at        time.Time
}

// outlet is one stream, which its test writes and closes.
type outlet struct {
	net.Conn
	gone chan struct{} // closed when the client has left it
	at   time.Time
}

// send is one write. It fails once the client has gone, and waits while that
// does not read.
func (f *outlet) send(parts ...string) error {
	_, err := io.WriteString(f, strings.Join(parts, ""))
	return err
}

// inWorld runs test with a world that it has to start.
func inWorld(t *testing.T, test func(*testing.T, *world)) {
	t.Helper()
	inBubble(t, func(t *testing.T) {
		w := &world{
			t: t, log: &logBuffer{}, source: newPipes(), target: newPipes(), feeds: make(chan *outlet, 1000), finished: make(chan struct{}),
			options: ClientOptions{
				Source: must(url.Parse("http://source/subscribe/ci/")), Token: "secret", ReconnectInterval: time.Second, HandlerTimeout: 10 * time.Second,
				Target: must(url.Parse("http://target/base")), Timeout: 30 * time.Second, RetryWindow: time.Minute, Concurrency: 32, RetryOn: passing,
			},
		}
		test(t, w)
	})
}

// start runs the client until the test ends.
func (w *world) start() {
	ctx, cancel := context.WithCancel(context.Background())
	w.sigterm = cancel
	w.Client = NewClient(w.options, newLogger(&Config{LogLevel: slog.LevelDebug}, w.log))
	for transport, p := range map[*http.Transport]*pipes{w.Client.source: w.source, w.Client.target: w.target} {
		transport.DialContext, transport.Proxy = p.dial, nil
	}
	serveOn(w.t, &http.Server{Handler: http.HandlerFunc(w.serveSource)}, w.source)
	go func() {
		defer close(w.finished)
		w.Client.Run(ctx)
	}()
	w.t.Cleanup(func() {
		cancel()
		<-w.finished
		if w.t.Failed() {
			w.t.Logf("log:\n%s", w.log)
		}
	})
}

// startAll is start with a target that answers by w.respond.
func (w *world) startAll() {
	serveOn(w.t, &http.Server{Handler: http.HandlerFunc(w.serveTarget)}, w.target)
	w.start()
}

func (w *world) serveSource(rw http.ResponseWriter, r *http.Request) {
	if r.Header.Get("X-Auth-Token") != "secret" || r.Header.Get("X-Relay-Client") == "" {
		w.t.Errorf("%s %s without token or name", r.Method, r.URL)
	}
	if r.Method == "POST" {
		body, _ := io.ReadAll(r.Body)
		w.mu.Lock()
		w.said = append(w.said, said{r.RequestURI, string(body), time.Now()})
		n := len(w.said)
		w.mu.Unlock()
		status := http.StatusNoContent
		if w.reply != nil {
			status = w.reply(n)
		}
		rw.WriteHeader(status)
		return
	}
	w.mu.Lock()
	w.began = append(w.began, time.Now())
	other := w.other
	w.mu.Unlock()
	if other != nil {
		other(rw, r)
		return
	}
	if r.RequestURI != w.options.Source.RequestURI() || r.Header.Get("Accept") != "text/event-stream" || r.Header.Get("X-Relay-Features") != "http, respond, drain" || r.Header["Last-Event-Id"] != nil {
		w.t.Errorf("subscribes to %s with %q", r.URL, r.Header)
	}
	conn, _, err := http.NewResponseController(rw).Hijack()
	if err != nil {
		w.t.Error(err)
		return
	}
	f := &outlet{conn, make(chan struct{}), time.Now()}
	go func() { // ends with the connection
		defer close(f.gone)
		io.Copy(io.Discard, conn)
	}()
	f.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n")
	w.feeds <- f
}

func (w *world) serveTarget(rw http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	w.mu.Lock()
	w.calls = append(w.calls, call{r.Header.Get("X-Relay-Event-Id"), r.Method, r.RequestURI, string(body), time.Now()})
	n := len(w.calls)
	w.mu.Unlock()
	if w.respond != nil {
		w.respond(rw, r, n)
	}
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

// ready is the next stream, ready and with a heartbeat of five seconds.
func (w *world) ready() *outlet {
	w.t.Helper()
	f := w.next()
	if err := f.send(readyFrame(5 * time.Second)); err != nil {
		w.t.Fatal(err)
	}
	synctest.Wait()
	return f
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

// forwarded and reported are what has come so far.
func (w *world) forwarded() []call {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.calls)
}

func (w *world) reported() []said {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.said)
}

// subscribe makes the source answer with something else than a stream.
func (w *world) subscribe(other http.HandlerFunc) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.other = other
}

// tries is when the client asked for a stream.
func (w *world) tries() []time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.began)
}

// ids is the events that reached the target, in order.
func (w *world) ids() (ids []string) {
	for _, c := range w.forwarded() {
		ids = append(ids, c.id)
	}
	return ids
}

// answer is the report on the only event that was sent.
func (w *world) answer() (Answer, said) {
	w.t.Helper()
	w.until("a report", func() bool { return len(w.reported()) > 0 })
	time.Sleep(time.Minute)
	list := w.reported()
	told := readReports(w.t, list[0].body)
	if len(list) != 1 || len(told) != 1 {
		w.t.Fatalf("reports %+v", list)
	}
	return told[0].Answer, list[0]
}

// told is one report.
type told struct {
	id string
	Answer
}

// told is all reports so far, in their order.
func (w *world) told() (list []told) {
	for _, request := range w.reported() {
		list = append(list, readReports(w.t, request.body)...)
	}
	return list
}

// readReports reads the reports of one request with net/http alone.
func readReports(t testing.TB, body string) (list []told) {
	t.Helper()
	for r := bufio.NewReader(strings.NewReader(body)); ; {
		if _, err := r.Peek(1); err != nil {
			return list
		}
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatalf("report %.200q: %v", body, err)
		}
		a := Answer{Status: resp.StatusCode, Headers: endToEnd(resp.Header), Err: resp.Header.Get("X-Relay-Error")}
		if a.Err != "" {
			a.Status = 0 // nobody said that
		}
		if a.Body, err = io.ReadAll(resp.Body); err != nil {
			t.Fatal(err)
		}
		list = append(list, told{resp.Header.Get("X-Relay-Event-Id"), a})
	}
}

// hook is the frame of an event that nobody waits for, asking that of one
// whose sender waits so long.
func hook(id string) string { return frameOf(eventOf("ci", bodyHook(id, 0))) }

func asking(id string, timeout time.Duration) string {
	return frameOf(eventOf("ci", bodyHook(id, timeout)))
}

func bodyHook(id string, timeout time.Duration) *Webhook {
	mode := modeAccept
	if timeout > 0 {
		mode = modeResponse
	}
	return &Webhook{ID: id, Method: "POST", Path: "/webhooks/ci/x", Query: "?a=1", Body: []byte("body of " + id), Time: time.Now(), Mode: mode, Timeout: timeout}
}

// at fails unless d is within 50 milliseconds of want: what memory and pipes
// add to a time is nothing in a bubble.
func at(t *testing.T, what string, d, want time.Duration) {
	t.Helper()
	if d < want || d > want+50*time.Millisecond {
		t.Errorf("%s after %v, want %v", what, d, want)
	}
}

// TestWatchdog: a stream that goes silent is cut after two heartbeats, a second
// and one more look, and one that never becomes ready after its own time.
func TestWatchdog(t *testing.T) {
	for _, tc := range []struct {
		name  string
		ready string // what the stream begins with
		want  time.Duration
	}{
		{"five seconds", readyFrame(5 * time.Second), 11 * time.Second},
		{"one second", readyFrame(time.Second), 3 * time.Second},
		{"no interval", "event: ready\ndata: {}\n\n", silenceDefault},
		{"no JSON", "event: ready\ndata: x\n\n", silenceDefault},
		{"not a number", "event: ready\ndata: {\"heartbeatInterval\":\"5000\"}\n\n", silenceDefault},
		{"zero", "event: ready\ndata: {\"heartbeatInterval\":0}\n\n", silenceDefault},
		{"negative", "event: ready\ndata: {\"heartbeatInterval\":-1}\n\n", silenceDefault},
		{"tiny", "event: ready\ndata: {\"heartbeatInterval\":0.001}\n\n", silenceDefault},
		{"huge", "event: ready\ndata: {\"heartbeatInterval\":1e300}\n\n", silenceDefault},
		{"a second ready changes nothing", readyFrame(5*time.Second) + readyFrame(time.Minute), 11 * time.Second},
		{"never ready", ": hello\n\nevent: heartbeat\ndata: {}\n\n", readyTimeout},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.startAll()
				f := w.next()
				f.send(tc.ready)
				<-f.gone
				at(t, "cut", time.Since(f.at), tc.want+lookAgain)
				synctest.Wait()
				if w.Check(t.Context()) == nil {
					t.Error("ready without a stream")
				}
				w.ready()
				if err := w.Check(t.Context()); err != nil {
					t.Errorf("after it: %v", err)
				}
			})
		})
	}
	t.Run("any byte keeps it open", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.startAll()
			f := w.ready()
			for range 30 {
				time.Sleep(10 * time.Second)
				if err := f.send(":\n"); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if err := w.Check(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			sent := time.Now()
			<-f.gone
			at(t, "cut", time.Since(sent), 11*time.Second+lookAgain)
		})
	})
	t.Run("a source that accepts and says nothing", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.subscribe(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
			w.startAll()
			time.Sleep(5 * time.Minute)
			if n := len(w.tries()); n < 7 || n > 13 {
				t.Errorf("%d tries in five minutes", n)
			}
		})
	})
}

// TestWatchdogWhileFull: a client that is full does not read, and must not
// take its own silence for the source's.
func TestWatchdogWhileFull(t *testing.T) {
	for _, together := range []bool{false, true} {
		t.Run(fmt.Sprintf("events come with ready %v", together), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				release := make(chan struct{})
				w.respond = func(_ http.ResponseWriter, _ *http.Request, n int) { <-release }
				w.options.Concurrency = 1
				w.options.Timeout = time.Hour
				w.startAll()
				f := w.next()
				begin := []string{readyFrame(5 * time.Second), hook("1"), hook("2"), hook("3")}
				if together {
					begin = []string{strings.Join(begin, "")}
				}
				go func() {
					for _, part := range begin {
						f.send(part)
					}
					for n := 4; n < 50; n++ { // a pipe holds nothing: this waits
						if f.send(hook(strconv.Itoa(n)), frameOf(heartbeatEvent)) != nil {
							return
						}
					}
				}()
				time.Sleep(10 * time.Minute)
				if len(w.tries()) != 1 {
					t.Errorf("%d streams were opened while the client was full", len(w.tries()))
				}
				if got := w.ids(); !slices.Equal(got, []string{"1"}) {
					t.Errorf("forwarded %q at once", got)
				}
				if w.Check(t.Context()) == nil {
					t.Error("ready, but nothing was read for minutes")
				}
				if w.Events.Load() > 2 {
					t.Errorf("%d events were taken, space is for one", w.Events.Load())
				}
				close(release)
				w.until("all events", func() bool { return len(w.ids()) == 49 })
				for i, id := range w.ids() {
					if id != strconv.Itoa(i+1) {
						t.Fatalf("order %q", w.ids())
					}
				}
				sent := time.Now()
				<-f.gone // and from now on it watches again
				if silent := time.Since(sent); silent > 12*time.Second {
					t.Errorf("cut after %v", silent)
				}
			})
		})
	}
}

// TestReconnectBackoff: pauses are jittered, grow to their longest, and only
// ready makes them short again. After a stream that lasted there is none.
func TestReconnectBackoff(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		var cuts []time.Time // ends of streams that were not ready
		w.subscribe(func(rw http.ResponseWriter, _ *http.Request) {
			n := len(w.tries())
			if n == 12 {
				w.subscribe(nil)
			}
			cuts = append(cuts, time.Now())
			if n%2 == 0 { // open, but not ready: no reason for haste either
				rw.Header().Set("Content-Type", "text/event-stream")
				io.WriteString(rw, ": hello\n\n"+hook("never"))
			} else {
				rw.WriteHeader(503)
			}
		})
		w.startAll()
		f := w.ready()
		pause := func(n int, ended time.Time, longest time.Duration) float64 {
			d := w.tries()[n].Sub(ended)
			if d < longest/2 || d > longest+50*time.Millisecond {
				t.Errorf("pause %d is %v, want between %v and %v", n, d, longest/2, longest)
			}
			return float64(d) / float64(longest)
		}
		var low, high float64 = 1, 0
		for n := 1; n <= 12; n++ {
			share := pause(n, cuts[n-1], min(time.Second<<(n-1), reconnectMax))
			low, high = min(low, share), max(high, share)
		}
		if high-low < 0.05 {
			t.Errorf("pauses are all between %v and %v of the longest: no jitter", low, high)
		}
		time.Sleep(streamLasts)
		f.Close()
		ended := time.Now()
		f = w.ready()
		at(t, "another stream", f.at.Sub(ended), 0)
		time.Sleep(streamLasts - time.Millisecond)
		f.Close()
		ended = time.Now()
		w.until("another try", func() bool { return len(w.tries()) == 15 })
		pause(14, ended, time.Second)
		if n := w.Reconnects.Load(); n != 2 {
			t.Errorf("%d reconnects counted, want those of the streams that were ready", n)
		}
	})
}

// issued is a certificate of its own for host, which ends at the given time, and a
// file with it.
func issuedBy(t testing.TB, host string, end time.Time) (tls.Certificate, string) {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{host}, NotBefore: end.Add(-time.Hour), NotAfter: end}
	if ip := net.ParseIP(host); ip != nil {
		template.DNSNames, template.IPAddresses = nil, []net.IP{ip}
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, writePEM(t, "CERTIFICATE", der)
}

// nowhere is a name server that knows no name.
func nowhere(context.Context, string, string) (net.Conn, error) {
	near, far := net.Pipe()
	go func() { // ends with the connection
		defer far.Close()
		for {
			size := make([]byte, 2) // of a message over TCP
			if _, err := io.ReadFull(far, size); err != nil {
				return
			}
			message := make([]byte, binary.BigEndian.Uint16(size))
			if _, err := io.ReadFull(far, message); err != nil {
				return
			}
			message[2], message[3] = 0x81, 0x83 // an answer: no such name (RFC 1035 section 4.1.1)
			far.Write(append(size, message...))
		}
	}()
	return near, nil
}

// TestHints: what keeps a client from its source or its target is told with what
// may mend it, and counted by its kind.
func TestHints(t *testing.T) {
	answering := func(status int, kind string) string {
		return newSource(t, func(_ int, w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", kind)
			w.WriteHeader(status)
		}).URL
	}
	secure := func(certificate tls.Certificate, set func(*tls.Config)) string {
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(418) }))
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		s.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
		if set != nil {
			set(s.TLS)
		}
		s.StartTLS()
		t.Cleanup(s.Close)
		return s.URL
	}
	good, goodFile := issuedBy(t, "127.0.0.1", time.Now().Add(time.Minute))
	other, otherFile := issuedBy(t, "relay.example.com", time.Now().Add(time.Minute))
	old, oldFile := issuedBy(t, "127.0.0.1", time.Now().Add(-time.Minute))
	closed := loopback(t)
	closed.Close()
	down := "http://" + closed.Addr().String()
	alert := loopback(t) // a TLS port that does not speak HTTP even then
	var served sync.WaitGroup
	served.Go(func() {
		for {
			conn, err := alert.Accept()
			if err != nil {
				return
			}
			http.ReadRequest(bufio.NewReader(conn))
			io.WriteString(conn, "\x15\x03\x01\x00\x02\x02\x46")
			conn.Close()
		}
	})
	t.Cleanup(func() {
		alert.Close()
		served.Wait()
	})

	const lost = "is this a relay's /subscribe/{channel}? (SOURCE_URL)"
	for _, tt := range []struct {
		name, url, ca string
		reason, hint  string
		target        bool // it is the same for a target
	}{
		{"404", answering(404, ""), "", "path", lost, false},
		{"a page", answering(200, "text/html"), "", "path", lost, false},
		{"401", answering(401, ""), "", "token", "AUTH_TOKEN is missing, or is not one that the source takes for this channel", false},
		{"403", answering(403, ""), "", "address", "the source does not take streams from this address (SUBSCRIBE_ALLOWED_IPS)", false},
		{"503", answering(503, ""), "", "busy", "the source is full, is shutting down or has lost its Redis", false},
		{"400", answering(400, ""), "", "status", "does the source want https? (SOURCE_URL)", false},
		{"500", answering(500, ""), "", "status", "", false},
		{"a redirect", answering(302, ""), "", "status", "", false},
		{"unknown CA", secure(good, nil), "", "tls", "nobody known vouches for the certificate: name its CA in CA_FILE", true},
		{"another host", secure(other, nil), otherFile, "tls", "the certificate is for another host name than the URL has", true},
		{"expired", secure(old, nil), oldFile, "tls", "the certificate has expired or is not valid yet: renew it, or set this machine's clock", true},
		{"plain port", strings.Replace(answering(404, ""), "http:", "https:", 1), "", "tls", "no TLS is spoken there: is it http:// instead of https://?", true},
		{"too old", secure(good, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS11; c.MinVersion = tls.VersionTLS10 }), goodFile, "tls", "the other side refused the handshake: tls: protocol version not supported", true},
		{"wants a certificate", secure(good, func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert }), goodFile, "tls", "the other side refused the handshake: tls: certificate required", true},
		{"TLS port", strings.Replace(secure(good, nil), "https:", "http:", 1), "", "status", "does the source want https? (SOURCE_URL)", false},
		{"TLS port of others", "http://" + alert.Addr().String(), "", "connection", "what is spoken there is no HTTP: is it https:// instead of http://?", true},
		{"no such host", "http://nowhere.example", "", "connection", "no such host: check the URL", true},
		{"down", down, "", "connection", "", true},
	} {
		check := func(t *testing.T, message, wantLevel string, source, target string) *Client {
			t.Helper()
			env := []string{"RECONNECT_INTERVAL=1h", "TARGET_RETRY_WINDOW=0"}
			if tt.ca != "" {
				env = append(env, "CA_FILE="+tt.ca)
			}
			c, said := newClientOf(t, source+"/subscribe/ci", target, env...), &logBuffer{}
			c.log = newLogger(&Config{}, said)
			for _, transport := range []*http.Transport{c.source, c.target} {
				transport.Proxy = nil
				if tt.name == "no such host" {
					transport.DialContext = (&net.Dialer{Resolver: &net.Resolver{PreferGo: true, Dial: nowhere}}).DialContext
				}
			}
			ctx, cancel := context.WithCancel(t.Context())
			var running sync.WaitGroup
			running.Go(func() { c.Run(ctx) })
			defer running.Wait()
			defer cancel()
			eventually(t, message, func() bool { return len(said.lines(message)) > 0 })
			line := said.lines(message)[0]
			if hint, _ := line["hint"].(string); hint != tt.hint || line["level"] != wantLevel || line["err"] == nil {
				t.Errorf("said %v, want %s with the hint %q", line, wantLevel, tt.hint)
			}
			return c
		}
		t.Run(tt.name, func(t *testing.T) {
			level := "WARN"
			if tt.reason == "token" || tt.reason == "address" {
				level = "ERROR"
			}
			c := check(t, "no stream from the source", level, tt.url, down)
			if n := c.Denied[tt.reason].Load(); n != 1 || total(c.Denied) != 1 {
				t.Errorf("%d are counted for %s, of %d", n, tt.reason, total(c.Denied))
			}
		})
		if tt.target {
			t.Run(tt.name+", of a target", func(t *testing.T) {
				source := steady(t, dataBlock(map[string]string{"originalUrl": "/webhooks/ci/x"})).URL
				c := check(t, "webhook given up", "ERROR", source, tt.url)
				if n := c.Forwards[answerUnreachable].Load(); n != 1 || total(c.Forwards) != 1 {
					t.Errorf("%d are counted as unreachable, of %d", n, total(c.Forwards))
				}
			})
		}
	}
	t.Run("never ready", func(t *testing.T) {
		inWorld(t, func(t *testing.T, w *world) {
			w.startAll()
			w.next().send(": hello\n\n")
			w.until("a line", func() bool { return len(w.log.lines("no stream from the source")) > 0 })
			line := w.log.lines("no stream from the source")[0]
			if line["hint"] != "a proxy may be buffering the stream: turn that off for /subscribe/" || line["level"] != "WARN" || w.Denied["silent"].Load() != 1 || total(w.Denied) != 1 {
				t.Errorf("said %v, counted %d", line, total(w.Denied))
			}
		})
	})
}

// TestTimesInLog: they are whole milliseconds, whatever the line.
func TestTimesInLog(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.respond = func(rw http.ResponseWriter, _ *http.Request, n int) { rw.WriteHeader([]int{503, 200}[min(n-1, 1)]) }
		w.startAll()
		f := w.ready()
		f.send(hook("1"))
		time.Sleep(4 * time.Second)
		w.subscribe(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(503) })
		f.Close()
		w.until("another try", func() bool { return len(w.log.lines("no stream from the source")) > 0 })
		for _, tt := range []struct {
			message, field string
			least, most    float64
		}{
			{"webhook will be forwarded again", "wait", 125, 250},
			{"webhook forwarded", "ms", 125, 300},
			{"stream ended", "age", 4000, 4050},
			{"no stream from the source", "again", 500, 1000},
		} {
			lines := w.log.lines(tt.message)
			if len(lines) != 1 {
				t.Fatalf("%d lines %q", len(lines), tt.message)
			}
			value, ok := lines[0][tt.field].(float64)
			if !ok || value < tt.least || value > tt.most || tt.field != "ms" && value != math.Trunc(value) {
				t.Errorf("%s of %q is %v, want milliseconds between %v and %v", tt.field, tt.message, lines[0][tt.field], tt.least, tt.most)
			}
		}
	})
}

// TestReconnectAsNew: what a stream said of ids and of retry changes nothing in
// how the client asks for the next one. Nothing is stored that it could ask for.
func TestReconnectAsNew(t *testing.T) {
	for _, retry := range []string{"", "retry: 0\n", "retry: 1\n\n", "retry: 600000\n\n"} {
		t.Run(fmt.Sprintf("%q", retry), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.options.ReconnectInterval = 4 * time.Second
				w.startAll()
				for n := range 3 {
					f := w.ready()
					f.send(retry, hook(strconv.Itoa(n)), "id: last\n", retry, "data\n\n")
					w.until("a webhook", func() bool { return len(w.ids()) == n+1 })
					f.Close()
					ended := time.Now()
					w.until("another try", func() bool { return len(w.tries()) == n+2 })
					if d := w.tries()[n+1].Sub(ended); d < 2*time.Second || d > 4*time.Second {
						t.Errorf("came back after %v, want the setting's 4s less a half at most", d)
					}
				}
			})
		})
	}
}

// TestReconnectForEver: nothing that a source says ends the client.
func TestReconnectForEver(t *testing.T) {
	answer := func(status int, headers ...string) func(*world) {
		return func(w *world) {
			w.subscribe(func(rw http.ResponseWriter, _ *http.Request) {
				for i := 0; i < len(headers); i += 2 {
					rw.Header().Set(headers[i], headers[i+1])
				}
				rw.WriteHeader(status)
				io.WriteString(rw, readyFrame(time.Second)+hook("unasked"))
			})
		}
	}
	for name, break_ := range map[string]func(*world){
		"200 with HTML":     answer(200, "Content-Type", "text/html"),
		"200 without type":  answer(200, "Content-Type", ""),
		"202 with a stream": answer(202, "Content-Type", "text/event-stream"),
		"204":               answer(204),
		"301":               answer(301, "Location", "http://evil/subscribe/ci/"),
		"307":               answer(307, "Location", "/subscribe/other/"),
		"400":               answer(400),
		"401":               answer(401),
		"403":               answer(403),
		"404":               answer(404),
		"429":               answer(429, "Retry-After", "86400"),
		"500":               answer(500),
		"503":               answer(503),
		"nobody listens":    func(w *world) { w.source.refuse(true) },
		"closes without answer": func(w *world) {
			w.subscribe(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				break_(w)
				w.startAll()
				time.Sleep(10 * time.Minute)
				records := w.log.lines("no stream from the source")
				least, most := 100, 200 // with pauses of up to 5 s
				if name[0] != '5' && !strings.HasPrefix(name, "200") && name[0] <= '9' {
					least, most = 15, 60 // up to 30 s
				}
				n, asked := len(records), len(w.tries())
				if n < least || n > most || asked > n+1 {
					t.Fatalf("%d tries with %d requests in ten minutes, want %d to %d, and no redirect followed", n, asked, least, most)
				}
				if level := records[0]["level"]; (level == "ERROR") != (name == "401" || name == "403") {
					t.Errorf("logged as %v", level)
				}
				if got := w.ids(); got != nil || w.log.lines("stream ready") != nil {
					t.Errorf("took %q from what is no stream", got)
				}
				if err := w.Alive(t.Context()); err != nil || w.Check(t.Context()) == nil {
					t.Errorf("alive: %v, ready: %v", err, w.Check(t.Context()))
				}
				w.subscribe(nil)
				w.source.refuse(false)
				w.ready().send(hook("last"))
				w.until("a webhook", func() bool { return len(w.ids()) == 1 })
			})
		})
	}
}

// TestClientDrain: make before break. The first stream is read to the end that
// the source makes; what comes on both is forwarded once.
func TestClientDrain(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.startAll()
		first := w.ready()
		drain := frameOf(drainEvent)
		time.Sleep(5 * time.Second)
		first.send(drain)
		second := w.next()
		at(t, "second stream", time.Since(first.at), 5*time.Second)
		first.send(drain, drain) // asking again opens no third
		time.Sleep(5 * time.Second)
		first.send(hook("before"))
		second.send(readyFrame(5*time.Second), hook("both"))
		moved := time.Now()
		synctest.Wait()
		if err := w.Check(t.Context()); err != nil {
			t.Error(err)
		}
		time.Sleep(4 * time.Second)
		first.send(hook("both"), hook("after"))
		synctest.Wait()
		if isClosed(first.gone) {
			t.Errorf("the first stream was left %s after the second was ready", time.Since(moved))
		}
		first.Close()
		second.send(hook("alone"))
		synctest.Wait()
		got := w.ids()
		slices.Sort(got)
		if !slices.Equal(got, []string{"after", "alone", "before", "both"}) || w.Duplicates.Load() != 1 {
			t.Errorf("forwarded %q, %d duplicates", got, w.Duplicates.Load())
		}
		if len(w.tries()) != 2 || w.Reconnects.Load() != 0 {
			t.Errorf("%d streams, %d reconnects", len(w.tries()), w.Reconnects.Load())
		}
		second.send(drain) // and once more: drain is for every stream
		third := w.next()
		second.Close() // which is no reason for a fourth
		time.Sleep(5 * time.Second)
		third.send(readyFrame(5*time.Second), hook("last"))
		w.until("a webhook over the third", func() bool { return len(w.ids()) == 5 })
		if len(w.tries()) != 3 {
			t.Errorf("%d streams were opened, want three", len(w.tries()))
		}
	})
}

// TestDrainWithoutSuccessor: a stream that was asked to move stays the one
// there is while no other comes up, and when it ends only a new one counts.
func TestDrainWithoutSuccessor(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.startAll()
		first := w.ready()
		w.subscribe(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(503) })
		first.send(frameOf(drainEvent))
		for n := range 60 {
			time.Sleep(5 * time.Second)
			if err := first.send(frameOf(heartbeatEvent), hook(strconv.Itoa(n))); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if n := len(w.ids()); n != 60 || w.Check(t.Context()) != nil {
			t.Errorf("%d of 60 webhooks came over the first stream; %v", n, w.Check(t.Context()))
		}
		if n := len(w.tries()); n < 50 || n > 100 {
			t.Errorf("%d tries in five minutes", n)
		}
		w.subscribe(nil)
		ended := time.Now()
		first.Close()
		synctest.Wait()
		if w.Check(t.Context()) == nil {
			t.Error("ready without a stream")
		}
		last := w.ready()
		at(t, "the next stream", last.at.Sub(ended), 0)
		last.send(hook("last"))
		w.until("a webhook over the new stream", func() bool { return len(w.ids()) == 61 })
	})
}

// TestDrainAtOnce: a source that asks every stream to move as soon as it is
// ready gets no more of them than one that cuts them.
func TestDrainAtOnce(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.startAll()
		go func() {
			for range 200 { // an end, or a bubble's clock would stand still for ever
				select {
				case f := <-w.feeds:
					f.send(readyFrame(5*time.Second), frameOf(drainEvent))
				case <-w.finished:
					return
				}
			}
		}()
		time.Sleep(10 * time.Second)
		if n := len(w.tries()); n > 25 || n < 2 {
			t.Errorf("%d streams in ten seconds", n)
		}
	})
}

// TestDrainInOrder: with one forward at a time the order holds over a move: what
// comes over the new stream waits for the old one's end.
func TestDrainInOrder(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.options.Concurrency = 1
		w.respond = func(http.ResponseWriter, *http.Request, int) { time.Sleep(5 * time.Second) }
		w.startAll()
		first := w.ready()
		first.send(hook("1"))
		first.send(frameOf(drainEvent), hook("2"))
		go func() { // the backlog of a client that is full
			first.send(hook("3"))
			first.send(hook("4"))
			first.send(hook("5"))
			first.Close()
		}()
		second := w.ready()
		go second.send(hook("4"), hook("5"), hook("6"))
		w.until("six webhooks", func() bool { return len(w.ids()) == 6 })
		if got := w.ids(); !slices.Equal(got, []string{"1", "2", "3", "4", "5", "6"}) {
			t.Errorf("forwarded %q", got)
		}
	})
}

// TestDrainWithoutEnd: a stream that the source asked to leave, and goes on
// writing to, is left in the end.
func TestDrainWithoutEnd(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.startAll()
		first := w.ready()
		first.send(frameOf(drainEvent))
		w.heartbeats(first)
		w.heartbeats(w.ready())
		moved := time.Now()
		<-first.gone
		at(t, "first stream left", time.Since(moved), leaveTime)
		if err := w.Check(t.Context()); err != nil || len(w.tries()) != 2 || w.Reconnects.Load() != 0 {
			t.Errorf("%v; %d streams, %d reconnects", err, len(w.tries()), w.Reconnects.Load())
		}
	})
}

// TestClientShutdown: at SIGTERM the client takes nothing more, says what it
// will still report, finishes that, and abandons it only when its time is over.
func TestClientShutdown(t *testing.T) {
	for _, tc := range []struct {
		name       string
		takes      time.Duration // the target
		want       time.Duration
		delivered  bool
		retryFirst bool
	}{
		{"idle target", 0, 0, true, false},
		{"slow target", 8 * time.Second, 8 * time.Second, true, false},
		{"a target that needs another try", 0, retryInitial, true, true},
		{"stuck target", time.Hour, 10 * time.Second, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.respond = func(rw http.ResponseWriter, r *http.Request, n int) {
					if tc.retryFirst && n == 1 {
						rw.WriteHeader(503)
						return
					}
					select {
					case <-time.After(tc.takes):
					case <-r.Context().Done():
					}
				}
				w.startAll()
				f := w.ready()
				f.send(asking("1", time.Minute))
				synctest.Wait()
				began := time.Now()
				w.sigterm()
				synctest.Wait()
				if !isClosed(f.gone) {
					t.Error("the stream stays open")
				}
				<-w.finished
				if d := time.Since(began); d > tc.want+50*time.Millisecond || d < tc.want/2 {
					t.Errorf("ended after %v, want %v", d, tc.want)
				}
				var want []string
				if tc.want > 0 { // it is under way at SIGTERM
					want = append(want, answerTaken)
				}
				if tc.delivered {
					want = append(want, "")
				}
				var got []string
				for _, one := range w.told() {
					got = append(got, one.Err)
				}
				if !slices.Equal(got, want) {
					t.Errorf("reports %q, want %q", got, want)
				}
				if len(w.tries()) != 1 {
					t.Error("subscribed again while ending")
				}
				if w.Check(context.Background()) == nil {
					t.Error("ready after the end")
				}
			})
		})
	}
}

// TestShutdownLeavesWhatWaits: what waits in the client for a free slot at
// SIGTERM was not reported and is left to the next client; a legacy server's
// webhooks nobody else gets, so they are forwarded while the handler timeout lasts.
func TestShutdownLeavesWhatWaits(t *testing.T) {
	for takes, want := range map[time.Duration]int{100 * time.Millisecond: 20, time.Second: 10} {
		t.Run(takes.String(), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.options.Concurrency = 1
				w.respond = func(_ http.ResponseWriter, r *http.Request, _ int) {
					select {
					case <-time.After(takes):
					case <-r.Context().Done():
					}
				}
				w.startAll()
				legacy := `data: {"originalUrl":"/webhooks/ci/legacy","body":"","headers":{}}` + "\n\n"
				w.ready().send(hook("first"), strings.Repeat(legacy, 19), hook("accepted"), asking("held", time.Minute))
				time.Sleep(50 * time.Millisecond)
				w.sigterm()
				began := time.Now()
				<-w.finished
				if n := len(w.ids()); n < want || slices.Contains(w.ids(), "held") || slices.Contains(w.ids(), "accepted") {
					t.Errorf("%q reached the target, want %d", w.ids(), want)
				}
				if list := w.told(); len(list) != 1 || list[0].id != "first" || list[0].Status != 202 {
					t.Errorf("reported %+v", list)
				}
				if d := time.Since(began); d > w.options.HandlerTimeout+50*time.Millisecond {
					t.Errorf("ended after %v", d)
				}
			})
		})
	}
}

// TestRetries: what is worth another try, when it comes, and what is final.
// The sender waits for two minutes, so that its report shows the end.
func TestRetries(t *testing.T) {
	const whole = 2 * time.Minute
	const window = whole - 500*time.Millisecond // the rest is for the report
	status := func(list ...int) func(http.ResponseWriter, *http.Request, int) {
		return func(rw http.ResponseWriter, _ *http.Request, n int) { rw.WriteHeader(list[min(n, len(list))-1]) }
	}
	with := func(status int, header string) func(http.ResponseWriter, *http.Request, int) {
		return func(rw http.ResponseWriter, _ *http.Request, n int) {
			if n == 1 {
				rw.Header().Set("Retry-After", header)
				rw.WriteHeader(status)
			}
		}
	}
	hang := func(_ http.ResponseWriter, r *http.Request, _ int) { <-r.Context().Done() }
	for _, tc := range []struct {
		name     string
		respond  func(http.ResponseWriter, *http.Request, int)
		set      func(*world)
		attempts int           // how many reach the target; 0: any number above 10
		status   int           // what is reported
		err      string        // likewise
		least    time.Duration // until the report
		most     time.Duration
	}{
		{"200", status(200), nil, 1, 200, "", 0, 0},
		{"400", status(400), nil, 1, 400, "", 0, 0},
		{"401", status(401), nil, 1, 401, "", 0, 0},
		{"404", status(404), nil, 1, 404, "", 0, 0},
		{"408", status(408), nil, 1, 408, "", 0, 0},
		{"500", status(500), nil, 1, 500, "", 0, 0},
		{"501", status(501), nil, 1, 501, "", 0, 0},
		{"302", status(302), nil, 1, 302, "", 0, 0},
		{"each that passes", status(429, 502, 503, 504, 204), nil, 5, 204, "", retryInitial * 11 / 2, retryInitial * 11}, // pauses of 1, 2, 4 and 4
		{"until the last moment", status(503), nil, 0, 503, "", window - retryHeld, window},
		{"Retry-After in seconds", with(429, "17"), nil, 2, 200, "", 17 * time.Second, 17 * time.Second},
		{"Retry-After as a date", with(503, "Sat, 01 Jan 2000 00:00:42 GMT"), nil, 2, 200, "", 41 * time.Second, 42 * time.Second},
		{"Retry-After in the past", with(503, "Fri, 31 Dec 1999 00:00:00 GMT"), nil, 2, 200, "", retryInitial / 2, retryInitial},
		{"Retry-After that is neither", with(503, "-5"), nil, 2, 200, "", retryInitial / 2, retryInitial},
		{"Retry-After beyond the window", with(503, "120"), nil, 1, 503, "", 0, 0},
		{"Retry-After beyond all numbers", with(503, "99999999999999999999"), nil, 2, 200, "", retryInitial / 2, retryInitial},
		{"Retry-After of a final answer", with(400, "17"), nil, 1, 400, "", 0, 0},
		{"silence", hang, nil, 4, 0, answerTimeout, window - retryHeld, window},
		{"silence after a status", func(rw http.ResponseWriter, r *http.Request, n int) {
			if n > 1 {
				hang(rw, r, n)
			}
			rw.WriteHeader(503)
		}, nil, 5, 503, "", window - retryHeld, window},
		{"a status after silence", func(rw http.ResponseWriter, r *http.Request, n int) {
			if n == 1 {
				hang(rw, r, n)
			}
			rw.WriteHeader(502)
		}, nil, 0, 502, "", window - retryHeld, window},
		{"connections that break", func(http.ResponseWriter, *http.Request, int) { panic(http.ErrAbortHandler) }, nil, 0, 0, answerUnreachable, window - retryHeld, window},
		{"silence after a connection that broke", func(rw http.ResponseWriter, r *http.Request, n int) {
			if n == 1 {
				panic(http.ErrAbortHandler)
			}
			hang(rw, r, n)
		}, nil, 5, 0, answerUnreachable, window - retryHeld, window},
		{"nobody listens", nil, func(w *world) { w.target.refuse(true) }, -1, 0, answerUnreachable, window - retryHeld, window},
		{"comes up late", nil, func(w *world) {
			w.target.refuse(true)
			time.AfterFunc(time.Minute, func() { w.target.refuse(false) })
		}, 1, 200, "", time.Minute - time.Second, time.Minute + retryHeld},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.respond = tc.respond
				f := w.steady(tc.set)
				sent := time.Now()
				f.send(asking("1", whole))
				a, report := w.answer()
				if a.Status != tc.status || a.Err != tc.err {
					t.Errorf("reported %+v, want %d %q", a, tc.status, tc.err)
				}
				if d := report.at.Sub(sent); d < tc.least || d > tc.most+50*time.Millisecond {
					t.Errorf("reported after %v, want %v to %v", d, tc.least, tc.most)
				}
				for _, line := range w.log.lines("webhook given up") { // says why what is told was told
					if why, _ := line["err"].(string); strings.Contains(why, "deadline exceeded") != (tc.err == answerTimeout) {
						t.Errorf("given up because of %q", why)
					}
				}
				calls := w.forwarded()
				if n := len(calls); tc.attempts > 0 && n != tc.attempts || tc.attempts == 0 && n < 11 {
					t.Errorf("%d attempts, want %d", n, tc.attempts)
				}
				for _, c := range calls {
					if c.id != "1" || c.method != "POST" || c.uri != "/base/webhooks/ci/x?a=1" || c.body != "body of 1" {
						t.Errorf("attempt %+v", c)
					}
				}
			})
		})
	}
}

// heartbeats keeps f alive until the test ends.
func (w *world) heartbeats(f *outlet) {
	running(w.t, func(ctx context.Context) {
		for ctx.Err() == nil && f.send(frameOf(heartbeatEvent)) == nil {
			select {
			case <-time.After(5 * time.Second):
			case <-ctx.Done():
			}
		}
	})
}

// steady is startAll and a ready stream that stays alive, with set behind it.
func (w *world) steady(set func(*world)) *outlet {
	w.startAll()
	f := w.ready()
	if set != nil {
		set(w)
	}
	w.heartbeats(f)
	return f
}

// TestRetryWindow: without a sender that waits, the window is the setting's.
func TestRetryWindow(t *testing.T) {
	for _, tc := range []struct {
		window      time.Duration
		least, most int
	}{{0, 1, 1}, {time.Second, 2, 4}, {time.Minute, 8, 20}} {
		t.Run(tc.window.String(), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.respond = func(rw http.ResponseWriter, _ *http.Request, _ int) { rw.WriteHeader(503) }
				w.options.RetryWindow = tc.window
				w.startAll()
				w.ready().send(hook("1"))
				w.until("giving up", func() bool { return len(w.log.lines("webhook given up")) == 1 })
				calls := w.forwarded()
				if n := len(calls); n < tc.least || n > tc.most || w.Retries.Load() != int64(n-1) {
					t.Errorf("%d attempts, %d retries counted, want %d to %d", n, w.Retries.Load(), tc.least, tc.most)
				}
				if took := calls[len(calls)-1].at.Sub(calls[0].at); took > tc.window {
					t.Errorf("last attempt after %v", took)
				}
			})
		})
	}
}

// TestRetryWindowBegins: the window is from the first attempt, so that an
// event that had to wait for its turn is not worth less.
func TestRetryWindowBegins(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.respond = func(rw http.ResponseWriter, _ *http.Request, n int) {
			switch n {
			case 1:
				time.Sleep(20 * time.Second)
			case 2:
				rw.WriteHeader(503)
			}
		}
		w.options.Concurrency = 1
		w.options.RetryWindow = 10 * time.Second
		w.startAll()
		w.ready().send(hook("1"), hook("2"))
		w.until("both are done", func() bool { return total(w.Forwards) == 2 })
		if got := w.ids(); !slices.Equal(got, []string{"1", "2", "2"}) {
			t.Errorf("forwarded %q, want another try of the second", got)
		}
	})
}

// TestConcurrency: so many forwards at once and no more; one keeps the order.
func TestConcurrency(t *testing.T) {
	for _, limit := range []int{1, 3} {
		t.Run(strconv.Itoa(limit), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				var now, most atomic.Int32
				w.respond = func(rw http.ResponseWriter, _ *http.Request, n int) {
					if at := now.Add(1); at > most.Load() {
						most.Store(at)
					}
					defer now.Add(-1)
					time.Sleep(time.Duration(n%3) * time.Second)
					if n == 4 {
						rw.WriteHeader(503) // whoever comes later still waits
					}
				}
				w.options.Concurrency = limit
				w.startAll()
				f := w.ready()
				go func() {
					for n := range 12 {
						f.send(hook(strconv.Itoa(n)))
					}
				}()
				w.until("all", func() bool { return total(w.Forwards) == 12 })
				if int(most.Load()) != limit {
					t.Errorf("%d at once, want %d", most.Load(), limit)
				}
				if want := []string{"0", "1", "2", "3", "3", "4", "5", "6", "7", "8", "9", "10", "11"}; limit == 1 && !slices.Equal(w.ids(), want) {
					t.Errorf("order %q", w.ids())
				}
			})
		})
	}
}

// TestSlowForwardIsRemembered: an id whose forward is under way is not
// forgotten, whatever else is answered meanwhile.
func TestSlowForwardIsRemembered(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.respond = func(rw http.ResponseWriter, r *http.Request, _ int) {
			if r.Header.Get("X-Relay-Event-Id") == "slow" {
				time.Sleep(5 * time.Second)
			} else {
				rw.Write(make([]byte, answerLimit))
			}
		}
		w.startAll()
		f := w.ready()
		f.send(asking("slow", 9*time.Second))
		large := memoryBytes/answerLimit + 1
		for n := range large {
			f.send(asking(strconv.Itoa(n), 9*time.Second))
		}
		w.until("large answers", func() bool { return len(w.reported()) == large })
		f.Close()
		w.ready().send(asking("slow", 7*time.Second)) // as a server does when a stream ended
		time.Sleep(10 * time.Second)
		if n := len(w.ids()); n != large+1 {
			t.Errorf("%d forwards of %d events", n, large+1)
		}
	})
}

// TestDuplicates: an id is forwarded once, whatever the mode; what was reported
// is reported again, from memory.
func TestDuplicates(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.respond = func(rw http.ResponseWriter, _ *http.Request, n int) {
			time.Sleep(time.Second)
			rw.WriteHeader(410 + n)
		}
		w.startAll()
		f := w.ready()
		check := func(duplicates int64, want ...string) {
			t.Helper()
			var got []string
			for _, one := range w.told() {
				got = append(got, fmt.Sprintf("%s %d", one.id, one.Status))
			}
			slices.Sort(got)
			if len(w.ids()) != 2 || w.Duplicates.Load() != duplicates || !slices.Equal(got, want) {
				t.Fatalf("forwarded %q, %d duplicates, reported %q", w.ids(), w.Duplicates.Load(), got)
			}
		}
		f.send(hook("a"))
		synctest.Wait()
		f.send(hook("a"), asking("b", time.Minute), asking("b", time.Minute)) // while both are under way
		time.Sleep(2 * time.Second)
		check(2, "a 202", "a 202", "b 412")
		f.send(hook("a"), asking("b", 30*time.Second))
		time.Sleep(takenDelay)
		check(4, "a 202", "a 202", "a 202", "b 412", "b 412")
		// A legacy server's events have no id: two alike are two webhooks.
		legacy := `data: {"originalUrl":"/webhooks/ci/x","body":"","headers":{}}` + "\n\n"
		f.send("id: 7\n"+legacy, "id: 7\n"+legacy)
		time.Sleep(2 * time.Second)
		if got := w.ids(); len(got) != 4 || got[2] == got[3] || len(got[2]) < 26 {
			t.Errorf("forwarded %q", got)
		}
	})
}

// TestClientReports: a report is repeated while its failure may pass and its event
// has time, and no longer.
func TestClientReports(t *testing.T) {
	status := func(list ...int) func(int) int {
		return func(n int) int { return list[min(n, len(list))-1] }
	}
	for _, tc := range []struct {
		name    string
		reply   func(n int) int
		set     func(*world)
		reports int // 0: any number above 5
		counted int64
	}{
		{"taken", status(204), nil, 1, 1},
		{"no such page, for a while", status(404, 404, 204), nil, 3, 1},
		{"wrong token", status(401), nil, 0, 0},
		{"not allowed", status(403), nil, 0, 0},
		{"refused", status(400), nil, 1, 0},
		{"passing failures", status(503, 502, 500, 504, 429, 204), nil, 6, 1},
		{"failing to the end", status(503), nil, 0, 0},
		{"refused after a failure", status(503, 400), nil, 2, 0},
		{"connection refused", status(204), func(w *world) {
			w.source.refuse(true)
			time.AfterFunc(10*time.Second, func() { w.source.refuse(false) })
		}, 1, 1},
		{"connection broken", func(n int) int {
			if n < 3 {
				panic(http.ErrAbortHandler)
			}
			return 204
		}, nil, 3, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.reply = tc.reply
				f := w.steady(tc.set)
				sent := time.Now()
				f.send(asking("id-1", 30*time.Second))
				time.Sleep(5 * time.Minute)
				reports := w.reported()
				if n := len(reports); tc.reports > 0 && n != tc.reports || tc.reports == 0 && n < 6 || w.Reports.Load() != tc.counted {
					t.Fatalf("%d reports, %d counted, want %d and %d", n, w.Reports.Load(), tc.reports, tc.counted)
				}
				for _, r := range reports {
					if r.uri != "/subscribe/ci/responses" || r.body != reports[0].body || r.at.Sub(sent) > 30*time.Second {
						t.Errorf("report %+v after %v", r, r.at.Sub(sent))
					}
				}
				if n := len(w.forwarded()); n != 1 {
					t.Errorf("%d forwards", n)
				}
			})
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
		{"quick source", 300, 0, 0, 300},
		{"slow source", 300, 500 * time.Millisecond, 0, 2 * reportsAtOnce},
		{"large answers", 90, 500 * time.Millisecond, 100 << 10, reportsAtOnce + 90/9},
		{"largest answers", 20, 10 * time.Millisecond, answerLimit, 20},
	} {
		t.Run(tc.name, func(t *testing.T) {
			events := tc.events
			inWorld(t, func(t *testing.T, w *world) {
				var now, most atomic.Int32
				w.reply = func(n int) int {
					if n := now.Add(1); n > most.Load() {
						most.Store(n)
					}
					defer now.Add(-1)
					time.Sleep(tc.takes)
					if n%5 == 3 {
						return 503
					}
					return 204
				}
				answer := make([]byte, tc.body)
				w.respond = func(rw http.ResponseWriter, _ *http.Request, _ int) { rw.Write(answer) }
				w.options.Concurrency = events
				f := w.steady(nil)
				for n := range events {
					f.send(asking(strconv.Itoa(n), time.Minute))
				}
				w.until("all are reported", func() bool { return int(w.Reports.Load()) == events })
				requests := w.reported()
				times := map[string]int{}
				for i, r := range requests {
					if r.uri != "/subscribe/ci/responses" {
						t.Fatalf("reported to %q", r.uri)
					}
					list := readReports(t, r.body)
					if len(list) > 1 && len(r.body) > reportBatch {
						t.Errorf("%d reports of %d bytes in one request", len(list), len(r.body))
					}
					for _, one := range list {
						if one.Status != 200 || len(one.Body) != tc.body {
							t.Fatalf("reported %d and %d bytes on %q", one.Status, len(one.Body), one.id)
						}
						if i%5 != 2 { // those were answered 503
							times[one.id]++
						}
					}
				}
				for n := range events {
					if k := times[strconv.Itoa(n)]; k != 1 {
						t.Errorf("event %d was reported %d times", n, k)
					}
				}
				if most.Load() > reportsAtOnce {
					t.Errorf("%d requests at a time", most.Load())
				}
				if n := len(requests); n > tc.most*5/4+1 {
					t.Errorf("%d requests, want %d and those that failed", n, tc.most)
				}
			})
		})
	}
}

// TestReportsEndWithTheirTime: each report of a request that fails is given up
// when its own sender's time is over, and not before.
func TestReportsEndWithTheirTime(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		var taken atomic.Bool
		w.reply = func(int) int {
			if taken.Load() {
				return 204
			}
			return 503
		}
		f := w.steady(nil)
		f.send(asking("short", 5*time.Second), asking("long", 30*time.Second))
		time.Sleep(20 * time.Second)
		if n := w.Reports.Load(); n != 0 {
			t.Fatalf("%d reports are counted", n)
		}
		taken.Store(true)
		w.until("the other one is taken", func() bool { return w.Reports.Load() == 1 })
		last := map[string]time.Duration{}
		for _, r := range w.reported() {
			for _, one := range readReports(t, r.body) {
				last[one.id] = r.at.Sub(f.at)
			}
		}
		if last["short"] > 5*time.Second || last["short"] < 3*time.Second || last["long"] < 20*time.Second {
			t.Errorf("last reported after %v", last)
		}
		if given := w.log.lines("report given up"); len(given) != 1 || given[0]["event"] != "short" {
			t.Errorf("given up: %v", given)
		}
	})
}

// How old events are.

// aged is a webhook that is so old by the clock of its replica, whose offset
// to ours is skew.
func aged(replica string, age, skew time.Duration) *Webhook {
	return &Webhook{ID: newID(replica), Time: time.Now().Add(skew - age)}
}

// TestClocks: the age of an event is found although every replica has a clock
// of its own, and drifts.
func TestClocks(t *testing.T) {
	names := make([]string, clocksLimit+10)
	for i := range names {
		names[i] = newReplica()
	}
	check := func(t *testing.T, what string, got, want, off time.Duration) {
		t.Helper()
		if got < want-off || got > want+off {
			t.Errorf("%s is %v old, want %v", what, got, want)
		}
	}
	t.Run("skew", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := &clocks{began: time.Now()}
			skews := []time.Duration{0, time.Hour, -time.Hour, -20 * time.Second, 10 * 365 * 24 * time.Hour}
			for i, skew := range skews {
				check(t, "the first", c.age(aged(names[i], 0, skew)), 0, 0)
			}
			for i, skew := range skews {
				time.Sleep(time.Second)
				check(t, "one on its way for long", c.age(aged(names[i], 7*time.Second, skew)), 7*time.Second, time.Millisecond)
				check(t, "the next", c.age(aged(names[i], 0, skew)), 0, time.Millisecond)
			}
			if c.age(aged(names[0], -time.Minute, 0)) != 0 || c.age(aged(names[0], 0, 0)) != time.Minute {
				t.Error("the youngest is no measure")
			}
		})
	})
	t.Run("an old one first", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := &clocks{began: time.Now()}
			check(t, "the first", c.age(aged(names[0], 5*time.Second, time.Hour)), 0, 0) // nobody can know better
			check(t, "a younger one", c.age(aged(names[0], time.Second, time.Hour)), 0, 0)
			check(t, "an old one again", c.age(aged(names[0], 5*time.Second, time.Hour)), 4*time.Second, time.Millisecond)
		})
	})
	t.Run("drift", func(t *testing.T) {
		for _, rate := range []float64{100e-6, -100e-6} { // more than any quartz
			synctest.Test(t, func(t *testing.T) {
				c := &clocks{began: time.Now()}
				drift := func() time.Duration { return time.Duration(rate * float64(time.Since(c.began))) }
				for time.Since(c.began) < 24*time.Hour {
					c.age(aged(names[0], 0, drift()))
					time.Sleep(10 * time.Second)
					check(t, "an old one", c.age(aged(names[0], 3*time.Second, drift())), 3*time.Second, 100*time.Millisecond)
				}
			})
		}
	})
	t.Run("windows", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := &clocks{began: time.Now()}
			c.age(aged(names[0], 0, 0))
			time.Sleep(ageWindow + time.Second)
			check(t, "the first of a window", c.age(aged(names[0], 4*time.Second, 0)), 4*time.Second, time.Millisecond)
			check(t, "the second", c.age(aged(names[0], 5*time.Second, 0)), 5*time.Second, time.Millisecond)
			// The replica's clock is set back: its events look old, but not for long.
			var last time.Duration
			for began := time.Now(); time.Since(began) < 2*ageWindow+time.Minute; time.Sleep(time.Second) {
				if c.age(aged(names[0], 0, -time.Minute)) > 0 {
					last = time.Since(began)
				}
			}
			if last > 2*ageWindow+2*time.Second {
				t.Errorf("events look old for %v after the clock was set", last)
			}
			// And forth: they never do.
			check(t, "from a clock set forth", c.age(aged(names[0], 0, time.Hour)), 0, 0)
			check(t, "the next", c.age(aged(names[0], 2*time.Second, time.Hour)), 2*time.Second, time.Millisecond)
		})
	})
	t.Run("a source that makes up replicas", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := &clocks{began: time.Now()}
			for range 100 {
				for _, name := range names {
					c.age(aged(name, 0, 0))
				}
				if len(c.offset) > clocksLimit {
					t.Fatalf("%d clocks are kept", len(c.offset))
				}
				c.age(&Webhook{ID: "x", Time: time.Unix(0, 0)})
				c.age(&Webhook{ID: "y", Time: time.UnixMilli(1 << 62)}) // wherever that is
			}
			last := names[len(names)-1]
			check(t, "one of the last", c.age(aged(last, time.Second, 0)), time.Second, time.Millisecond)
		})
	})
}

// TestOverdue: an event whose sender has been answered is not forwarded, nor
// reported; one that is late is given what is left; one for which nobody waits
// is never too old.
func TestOverdue(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.respond = func(_ http.ResponseWriter, r *http.Request, _ int) {
			if r.Header.Get("X-Relay-Event-Id") == "late" {
				<-r.Context().Done()
			}
		}
		f := w.steady(nil)
		send := func(id string, age, timeout time.Duration) {
			h := bodyHook(id, timeout)
			h.Time = h.Time.Add(time.Hour - age) // a replica whose clock is an hour ahead
			f.send(frameOf(eventOf("ci", h)))
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
		report := w.reported()[2]
		if list := readReports(t, report.body); len(list) != 1 || list[0].id != "late" || list[0].Err != answerTimeout {
			t.Errorf("reported %+v", list)
		}
		at(t, "reported", report.at.Sub(sent), 3500*time.Millisecond)
		if got := w.ids(); !slices.Equal(got, []string{"fresh", "nobody", "late"}) {
			t.Errorf("forwarded %q", got)
		}
		// It is new when it comes again in time: the server gave it to us once more.
		send("over", time.Second, 9*time.Second)
		if got := w.ids(); got[len(got)-1] != "over" {
			t.Errorf("forwarded %q", got)
		}
	})
}

// TestReportHangs: a report whose connection says nothing is given up after its
// own time and sent again over another one.
func TestReportHangs(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.reply = func(n int) int {
			if n == 1 {
				time.Sleep(time.Minute)
			}
			return 204
		}
		w.steady(nil).send(asking("1", 30*time.Second))
		w.until("a report is taken", func() bool { return w.Reports.Load() == 1 })
		reports := w.reported()
		if len(reports) != 2 || reports[0].body != reports[1].body {
			t.Fatalf("reports %+v", reports)
		}
		if d := reports[1].at.Sub(reports[0].at) - reportTimeout; d < retryInitial/2 || d > retryInitial+50*time.Millisecond {
			t.Errorf("sent again %v after %v", d, reportTimeout)
		}
		time.Sleep(time.Minute) // the handler of the first one ends
	})
}

// TestTargetConnectionReuse: webhooks in short succession share a connection,
// and an idle one is closed before a target does that on its side, which would
// meet the next webhook.
func TestTargetConnectionReuse(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		var opened, closed []time.Time // guarded by w.mu
		note := func(_ net.Conn, state http.ConnState) {
			w.mu.Lock()
			defer w.mu.Unlock()
			switch state {
			case http.StateNew:
				opened = append(opened, time.Now())
			case http.StateClosed:
				closed = append(closed, time.Now())
			}
		}
		serveOn(t, &http.Server{Handler: http.HandlerFunc(w.serveTarget), ConnState: note}, w.target)
		w.start()
		f := w.ready()
		w.heartbeats(f)
		for n := range 3 {
			f.send(hook(strconv.Itoa(n)))
			time.Sleep(reuseTimeout - 100*time.Millisecond)
		}
		last := w.forwarded()[2].at
		time.Sleep(time.Minute)
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(opened) != 1 || len(closed) != 1 {
			t.Fatalf("%d connections were opened, %d closed", len(opened), len(closed))
		}
		at(t, "closed", closed[0].Sub(last), reuseTimeout)
	})
}

// TestAnswers is what of a target's answer a provider may see.
func TestAnswers(t *testing.T) {
	const of, empty = "X-Relay-Event-Id: 1\r\n\r\n", "X-Relay-Event-Id: 1\r\nContent-Length: 0\r\n\r\n"
	large := strings.Repeat("a", answerLimit+1)
	for _, tc := range []struct {
		name   string
		brief  bool   // the sender waits for the status alone
		answer string // raw
		want   string // the report
	}{
		{"response", false, "HTTP/1.1 201 Created\r\nContent-Type: text/plain\r\nX-Dup: 1\r\nX-Dup: 2\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: x\r\nX-Relay-Client: x\r\nContent-Length: 5\r\n\r\nhi\r\n\xc3", "HTTP/1.1 201 Created\r\nContent-Length: 5\r\nContent-Type: text/plain\r\nX-Dup: 1\r\nX-Dup: 2\r\n" + of + "hi\r\n\xc3"},
		{"status", true, "HTTP/1.1 201 Created\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nhi", "HTTP/1.1 201 Created\r\n" + empty},
		{"chunked", false, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + of + "hi"},
		{"without a length", false, "HTTP/1.0 200 OK\r\n\r\nhi", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + of + "hi"},
		{"empty", false, "HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 204 No Content\r\n" + of},
		{"a failure too", false, "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n" + of + "no"},
		{"compressed stays compressed", false, "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd", "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Encoding: gzip\r\n" + of + "abcd"},
		{"as large as may be", false, "HTTP/1.1 200 OK\r\nContent-Length: " + strconv.Itoa(answerLimit) + "\r\n\r\n" + large[1:], "HTTP/1.1 200 OK\r\nContent-Length: " + strconv.Itoa(answerLimit) + "\r\n" + of + large[1:]},
		{"too large", false, "HTTP/1.1 200 OK\r\nX-A: b\r\nContent-Length: " + strconv.Itoa(answerLimit+1) + "\r\n\r\n" + large, "HTTP/1.1 200 OK\r\nX-A: b\r\n" + empty},
		{"too large and nobody reads it", true, "HTTP/1.1 200 OK\r\nContent-Length: " + strconv.Itoa(answerLimit+1) + "\r\n\r\n" + large, "HTTP/1.1 200 OK\r\n" + empty},
		{"names that are no tokens", false, "HTTP/1.1 200 OK\r\nX-A : b\r\nContent-Length: 2\r\n\r\nhi", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + of + "hi"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.serveRaw(func(conn net.Conn, _ recorded) { io.WriteString(conn, tc.answer) })
				w.start()
				hook := bodyHook("1", 9*time.Second)
				if tc.brief {
					hook.Mode = modeStatus
				}
				w.ready().send(frameOf(eventOf("ci", hook)))
				_, report := w.answer()
				if report.body != tc.want {
					t.Errorf("reported %.200q, want %.200q", report.body, tc.want)
				}
			})
		})
	}
}

// serveRaw answers every request to the target by serve, and then closes its
// connection.
func (w *world) serveRaw(serve func(net.Conn, recorded)) {
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			conn, err := w.target.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer conn.Close()
				if req, err := readRecorded(bufio.NewReader(conn)); err == nil {
					w.mu.Lock()
					w.calls = append(w.calls, call{id: req.get("X-Relay-Event-Id"), at: time.Now()})
					w.mu.Unlock()
					serve(conn, req)
				}
			})
		}
	})
	w.t.Cleanup(func() {
		w.target.Close()
		conns.Wait()
	})
}

// TestRedirected: 307 and 308 repeat the request as it was, so often and no
// more.
func TestRedirected(t *testing.T) {
	for redirects, status := range map[int]int{2: 200, redirectLimit: 200, redirectLimit + 1: 0} {
		t.Run(strconv.Itoa(redirects), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.respond = func(rw http.ResponseWriter, r *http.Request, n int) {
					if n <= redirects {
						http.Redirect(rw, r, fmt.Sprintf("/base/other?n=%d", n), 307+n%2)
					}
				}
				w.startAll()
				w.ready().send(asking("1", 100*time.Millisecond)) // too short for a second attempt
				if a, _ := w.answer(); a.Status != status {
					t.Errorf("reported %+v, want %d", a, status)
				}
				for n, c := range w.forwarded() {
					want := call{"1", "POST", fmt.Sprintf("/base/other?n=%d", n), "body of 1", c.at}
					if n == 0 {
						want.uri = "/base/webhooks/ci/x?a=1"
					}
					if c != want {
						t.Errorf("request %+v, want %+v", c, want)
					}
				}
			})
		})
	}
}

// TestReportURL: a report goes below the stream's own URL, whatever that is.
func TestReportURL(t *testing.T) {
	for source, want := range map[string]string{
		"http://source/subscribe/ci/":              "/subscribe/ci/responses",
		"http://source/subscribe/ci":               "/subscribe/ci/responses",
		"http://source/prefix/subscribe/ci/":       "/prefix/subscribe/ci/responses",
		"http://source/subscribe/ci/?tenant=a%2Fb": "/subscribe/ci/responses?tenant=a%2Fb",
		"http://source/a%2Fb/subscribe/ci/":        "/a%2Fb/subscribe/ci/responses",
	} {
		t.Run(source, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.options.Source = must(url.Parse(source))
				w.startAll()
				w.ready().send(asking("id-1", time.Second))
				if _, report := w.answer(); report.uri != want {
					t.Errorf("reported to %q, want %q", report.uri, want)
				}
			})
		})
	}
}

// TestHostileTarget: whatever stands at the target costs a bounded amount for
// a bounded time, and the client lives on.
func TestHostileTarget(t *testing.T) {
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	z.Write(make([]byte, 16<<20))
	z.Close()
	head := "HTTP/1.1 200 OK\r\n"
	repeat := func(start, piece string) func(net.Conn, recorded) {
		return func(conn net.Conn, _ recorded) {
			_, err := io.WriteString(conn, start)
			for piece = strings.Repeat(piece, 1+4096/len(piece)); err == nil; {
				_, err = io.WriteString(conn, piece)
			}
		}
	}
	trickle := func(start, piece string) func(net.Conn, recorded) {
		return func(conn net.Conn, _ recorded) {
			_, err := io.WriteString(conn, start)
			for err == nil {
				time.Sleep(time.Second)
				_, err = io.WriteString(conn, piece)
			}
		}
	}
	once := func(answer string) func(net.Conn, recorded) {
		return func(conn net.Conn, _ recorded) { io.WriteString(conn, answer) }
	}
	const unread = "that nobody waits for"
	for _, tc := range []struct {
		name   string
		serve  func(net.Conn, recorded)
		status int
		err    string
		heard  bool // it has the webhook: another try would deliver it twice
	}{
		{"endless body " + unread, repeat(head+"\r\n", "a"), 200, "", false},
		{"trickling body " + unread, trickle(head+"\r\n", "a"), 200, "", false},
		{"endless body", repeat(head+"\r\n", "a"), 200, "", false},
		{"endless chunks", repeat(head+"Transfer-Encoding: chunked\r\n\r\n", "1\r\na\r\n"), 200, "", false},
		{"endless chunk extension", repeat(head+"Transfer-Encoding: chunked\r\n\r\n1;", "a"), 0, answerUnreachable, true},
		{"endless header", repeat(head, "X-A: b\r\n"), 0, answerUnreachable, false},
		{"endless header line", repeat(head+"X-A: ", "b"), 0, answerUnreachable, false},
		{"endless status line", repeat("HTTP/1.1 200 ", "b"), 0, answerUnreachable, false},
		{"endless 1xx", repeat("", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"), 0, answerUnreachable, false},
		{"endless trailer", repeat(head+"Transfer-Encoding: chunked\r\n\r\n0\r\n", "X-A: b\r\n"), 0, answerUnreachable, true},
		{"a body that trickles", trickle(head+"\r\n", "a"), 0, answerTimeout, true},
		{"a header that trickles", trickle(head, "X-A: b\r\n"), 0, answerTimeout, false},
		{"1xx that trickle", trickle("", "HTTP/1.1 100 Continue\r\n\r\n"), 0, answerTimeout, false},
		{"silence", func(conn net.Conn, _ recorded) { io.Copy(io.Discard, conn) }, 0, answerTimeout, false},
		{"redirect loop", once("HTTP/1.1 307 x\r\nConnection: close\r\nLocation: /base/x\r\nContent-Length: 0\r\n\r\n"), 0, answerUnreachable, true},
		{"redirect with an endless body", repeat("HTTP/1.1 308 x\r\nLocation: /base/x\r\n\r\n", "a"), 0, answerUnreachable, true},
		{"redirect elsewhere", once("HTTP/1.1 307 x\r\nLocation: http://evil/base/x\r\nContent-Length: 0\r\n\r\n"), 307, "", false},
		{"decompression bomb", once(head + "Content-Encoding: gzip\r\nContent-Length: " + strconv.Itoa(bomb.Len()) + "\r\n\r\n" + bomb.String()), 200, "", false},
		{"switching protocols", once("HTTP/1.1 101 x\r\nUpgrade: evil\r\nConnection: Upgrade\r\n\r\n"), 0, answerUnreachable, true},
		{"status below", once("HTTP/1.1 99 x\r\n\r\n"), 0, answerUnreachable, false},
		{"status above", once("HTTP/1.1 999 x\r\nContent-Length: 0\r\n\r\n"), 0, answerUnreachable, true},
		{"no HTTP", once("\x00\xff" + canary + "\r\n\r\n"), 0, answerUnreachable, false},
		{"a body cut short", once(head + "Content-Length: 10\r\n\r\nabc"), 0, answerUnreachable, true},
		{"two lengths", once(head + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"), 0, answerUnreachable, false},
		{"NUL in a header", once(head + "X-A: " + canary + "\x00\r\n\r\n"), 0, answerUnreachable, false},
		{"a failure cut short", once("HTTP/1.1 503 x\r\nContent-Length: 10\r\n\r\nabc"), 503, "", false},
		{"redirect whose body stalls", func(conn net.Conn, req recorded) {
			if strings.Contains(req.line, "/base/new") {
				io.WriteString(conn, ok200)
			} else {
				trickle("HTTP/1.1 307 x\r\nLocation: /base/new\r\nContent-Length: 100\r\n\r\n", "a")(conn, req)
			}
		}, 200, "", false},
		{"folded header", once(head + "X-A: b\r\n c\r\nContent-Length: 0\r\n\r\n"), 200, "", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				var before, after runtime.MemStats
				w.serveRaw(func(conn net.Conn, req recorded) {
					if req.get("X-Relay-Event-Id") == "after" {
						io.WriteString(conn, ok200)
					} else {
						tc.serve(conn, req)
					}
				})
				w.options.Timeout = 3 * time.Second
				w.start()
				f := w.ready()
				runtime.ReadMemStats(&before)
				sent := time.Now()
				hostile := bodyHook("1", 9*time.Second)
				brief := strings.HasSuffix(tc.name, unread)
				if brief {
					hostile.Mode = modeStatus
				}
				f.send(frameOf(eventOf("ci", hostile)))
				synctest.Wait()
				w.heartbeats(f)
				a, report := w.answer()
				runtime.ReadMemStats(&after)
				if a.Status != tc.status || a.Err != tc.err {
					t.Errorf("reported %+v, want %d %q", a, tc.status, tc.err)
				}
				if n := len(w.ids()); tc.heard && n > redirectLimit+1 {
					t.Errorf("the target was called %d times", n)
				}
				if d := report.at.Sub(sent); d > 9*time.Second || brief && d > time.Second {
					t.Errorf("reported after %v", d)
				}
				if mib := (after.TotalAlloc - before.TotalAlloc) >> 20; mib > 32 {
					t.Errorf("%d MiB were allocated", mib)
				}
				if len(report.body) > 64<<10 {
					t.Errorf("the report has %d bytes", len(report.body))
				}
				f.send(hook("after"))
				w.until("a webhook after it", func() bool { return slices.Contains(w.ids(), "after") })
				if strings.Contains(w.log.String(), canary) {
					t.Errorf("the log quotes the target:\n%s", w.log)
				}
			})
		})
	}
}

// TestHostileStream: whatever a source sends, nothing of it leaves the
// target's base, the client stays within its bounds and keeps nothing of it, and
// the next good event is forwarded.
func TestHostileStream(t *testing.T) {
	many := strings.Repeat("data:x\n\n", 4096)
	message := func(line, fields string) string {
		return "data: " + strings.ReplaceAll(line+" HTTP/1.1\n"+fields+"Content-Length: 0\n\n", "\n", "\ndata: ") + "\n\n"
	}
	sent := func(line, fields string) string { return "id: 1\nevent: webhook\n" + message(line, fields) }
	for _, tc := range []struct {
		name    string
		piece   string
		repeat  int   // 0: until the client ends the stream
		invalid int64 // events refused
	}{
		{"endless line", strings.Repeat("a", 1<<20), 0, 0},
		{"endless event", "data:" + strings.Repeat("a", 1<<20) + "\n", 0, 0},
		{"tiny events", many, 4, 4 * 4096},
		{"large events", "data:" + strings.Repeat("a", 1<<20) + "\n\n", 32, 32},
		{"empty lines", strings.Repeat("\n", 64<<10), 16, 0},
		{"comments", strings.Repeat(":\r", 64<<10), 8, 0},
		{"bad JSON", "data: {\n\ndata: null\n\ndata: []\n\ndata: {\"originalUrl\":5}\n\n", 1, 4},
		{"no HTTP", "event: webhook\ndata: {}\n\nevent: webhook\ndata\n\nevent: webhook\ndata\ndata\ndata\n\n", 1, 3},
		{"large heads", "event: webhook\ndata: " + strings.Repeat("a", 1<<20) + "\n\n", 32, 32},
		{"large heads of fields", "id: 1\nevent: webhook\n" + message("POST /webhooks/ci/x", strings.Repeat("A: b\n", 200_000)), 8, 8},
		{"huge retry", "retry: 999999999999999999999\nretry: 0\n\n", 1, 0},
		{"outside the base", `data: {"originalUrl":"/webhooks/ci/../x"}` + "\n\n" + `data: {"originalUrl":"/webhooks/ci/%2e%2e/x"}` + "\n\n" + `data: {"originalUrl":"@evil/x"}` + "\n\n" + `data: {"originalUrl":"/webhooks/ci/x\\y"}` + "\n\n", 1, 4},
		{"outside the base, as HTTP", sent("POST /webhooks/ci/../x", "") + sent("POST /webhooks/ci/%2e%2e/x", "") + sent("POST @evil/x", "") + sent(`POST /webhooks/ci/x\y`, ""), 1, 4},
		{"split requests", `data: {"originalUrl":"/webhooks/ci/x HTTP/1.1\r\nA: b"}` + "\n\n" + `data: {"originalUrl":"/webhooks/ci/x","headers":{"a":"b\r\nc: d"}}` + "\n\n" + `data: {"originalUrl":"/webhooks/ci/x","headers":{"a\r\nb":"c"}}` + "\n\n", 1, 3},
		{"split requests, as HTTP", sent("POST /webhooks/ci/x HTTP/1.1\x00", "") + sent("A B /webhooks/ci/x", "") + sent("POST /webhooks/ci/x", "A: b\x00\n") + sent("POST /webhooks/ci/x", "A\x00: b\n"), 1, 4},
		{"ids for paths", "id: ../../other\nevent: webhook\n" + message("POST /webhooks/ci/x", "X-Relay-Respond: status; timeout=9000\n") + "id\n\n", 1, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.startAll()
				f := w.ready()
				piece := []byte(tc.piece)
				var before, after runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&before)
				var err error
				sent := 0
				for n := 0; err == nil && (n < tc.repeat || tc.repeat == 0 && sent < 2*lineLimit); n++ {
					_, err = f.Write(piece)
					sent += len(piece)
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
				w.until("a webhook after it", func() bool { return len(w.ids()) > 0 })
				if got := w.ids(); !slices.Equal(got, []string{"after"}) || w.Invalid.Load() != tc.invalid {
					t.Errorf("forwarded %q, %d events refused, want %d", got, w.Invalid.Load(), tc.invalid)
				}
				runtime.GC()
				runtime.ReadMemStats(&after)
				if mib := (after.TotalAlloc - before.TotalAlloc) >> 20; mib > 32+10*uint64(sent>>20) {
					t.Errorf("%d MiB were allocated for %d", mib, sent>>20)
				}
				if after.HeapAlloc > before.HeapAlloc+3*keepBuffer {
					t.Errorf("%d KiB stay", (after.HeapAlloc-before.HeapAlloc)>>10)
				}
			})
		})
	}
}

// TestFloodOfInvalidEvents: a source that sends nothing but rubbish is counted
// to the last event, and does not fill the log.
func TestFloodOfInvalidEvents(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.startAll()
		f := w.ready()
		const flood = 20 * hushLines
		for second := range 3 {
			f.send(strings.Repeat("data: {\n\n", flood))
			synctest.Wait()
			if n, logged := w.Invalid.Load(), len(w.log.lines("event refused")); n != int64(second+1)*flood || logged != (second+1)*hushLines {
				t.Errorf("second %d: %d events are counted, %d logged, want %d and %d", second, n, logged, (second+1)*flood, (second+1)*hushLines)
			}
			time.Sleep(time.Second)
		}
	})
}

// TestMemory: ids are remembered within bounds of count, bytes and age, the
// oldest forgotten first.
func TestMemory(t *testing.T) {
	known := func(m *memory, id string) bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.entries[id] != nil
	}
	check := func(t *testing.T, m *memory) {
		t.Helper()
		m.mu.Lock()
		defer m.mu.Unlock()
		bytes := 0
		for _, e := range m.entries {
			bytes += e.size
		}
		if bytes != m.bytes || len(m.entries) > memoryEvents || len(m.order) > memoryEvents || m.bytes > memoryBytes {
			t.Errorf("%d entries, %d in order, %d bytes, %d counted", len(m.entries), len(m.order), bytes, m.bytes)
		}
	}
	t.Run("once", func(t *testing.T) {
		var m memory
		if first, taken, a := m.begin("a", modeStatus); !first || taken || a != nil {
			t.Errorf("new: %v, %v, %v", first, taken, a)
		}
		if first, taken, a := m.begin("a", modeStatus); first || taken || a != nil {
			t.Errorf("waits for a slot: %v, %v, %v", first, taken, a)
		}
		if told := false; !m.take("a", func() { told = true }) || !told {
			t.Error("not taken")
		}
		if first, taken, a := m.begin("a", modeStatus); first || !taken || a != nil {
			t.Errorf("under way: %v, %v, %v", first, taken, a)
		}
		m.finish("a", &Answer{Status: 201})
		m.finish("a", &Answer{Status: 500})
		m.finish("b", &Answer{Status: 500}) // forgotten meanwhile
		if first, taken, a := m.begin("a", modeStatus); first || !taken || a == nil || a.Status != 201 {
			t.Errorf("answered: %v, %v, %v", first, taken, a)
		}
		m.begin("c", modeStatus)
		m.forget("c")
		m.forget("c")
		if first, _, _ := m.begin("c", modeStatus); !first {
			t.Error("not forgotten")
		}
		m.finish("c", &Answer{Status: 202})
		check(t, &m)
	})
	t.Run("count", func(t *testing.T) {
		var m memory
		m.begin("under way", modeStatus)
		for n := range memoryEvents + 100 {
			m.begin(strconv.Itoa(n), modeStatus)
			m.finish(strconv.Itoa(n), &Answer{Status: 200})
		}
		if known(&m, "99") || !known(&m, "100") || !known(&m, strconv.Itoa(memoryEvents+99)) {
			t.Error("not the oldest were forgotten")
		}
		if !known(&m, "under way") {
			t.Error("what is under way was forgotten")
		}
		m.forget("under way")
		check(t, &m)
	})
	t.Run("bytes", func(t *testing.T) {
		var m memory
		body := make([]byte, 1<<20)
		for n := range 40 {
			id := strconv.Itoa(n)
			m.begin(id, modeStatus)
			m.finish(id, &Answer{Status: 200, Body: body, Headers: []Header{{"A", []string{strings.Repeat("b", 1000)}}}})
		}
		if known(&m, "24") || !known(&m, "25") || !known(&m, "39") {
			t.Errorf("%d large answers remembered", len(m.entries))
		}
		check(t, &m)
	})
	t.Run("age", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var m memory
			for i, id := range []string{"old", "young", "new"} {
				time.Sleep(time.Duration(i) * (memoryAge/3 + time.Second))
				m.begin(id, modeStatus)
				m.finish(id, &Answer{Status: 200})
			}
			if known(&m, "old") || !known(&m, "young") {
				t.Error("age does not count")
			}
			check(t, &m)
		})
	})
	t.Run("what is forgotten is freed", func(t *testing.T) {
		var m memory
		var answers []weak.Pointer[Answer]
		for n := range 2000 { // so many that the queue of ids has space to hide in
			m.begin(strconv.Itoa(n), modeStatus)
			m.finish(strconv.Itoa(n), &Answer{Status: 200})
		}
		body := make([]byte, 1<<20)
		for n := range 200 {
			id := "large" + strconv.Itoa(n)
			a := &Answer{Status: 200, Body: body}
			answers = append(answers, weak.Make(a))
			m.begin(id, modeStatus)
			m.finish(id, a)
		}
		runtime.GC()
		held := 0
		for _, p := range answers {
			if p.Value() != nil {
				held++
			}
		}
		if held > memoryBytes/len(body) {
			t.Errorf("%d answers of 1 MiB are held, memory counts %d bytes", held, m.bytes)
		}
		runtime.KeepAlive(&m)
	})
}

// TestAlive: a probe tells a client that waits from one that hangs.
func TestAlive(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.startAll()
		if err := w.Check(t.Context()); err == nil {
			t.Error("ready before the stream is")
		}
		w.ready()
		if err := errors.Join(w.Check(t.Context()), w.Alive(t.Context())); err != nil {
			t.Error(err)
		}
		w.sigterm()
		<-w.finished
		ctx, cancel := context.WithTimeout(t.Context(), checkTimeout)
		defer cancel()
		if w.Alive(ctx) == nil {
			t.Error("alive without a loop")
		}
	})
}

// Benchmarks.

// pushStream is n push events as they come over the network, in bursts.
func pushStream(n int) []byte { return bytes.Repeat(block(eventOf("github", pushHook()).chunk), n) }

// lines is the least that a reader of events must do: find the lines.
func lines(data []byte, each func(line []byte)) {
	r := bufio.NewReaderSize(bytes.NewReader(data), 64<<10)
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return
		}
		each(line)
	}
}

// BenchmarkParse: events of 10 KiB off a stream, beside bufio finding their lines.
func BenchmarkParse(b *testing.B) {
	const n = 500
	data := pushStream(n)
	read := func() {
		p := newParser(bytes.NewReader(data))
		for range n {
			if _, err := p.next(); err != nil {
				b.Fatal(err)
			}
		}
	}
	duel(b, "event", n, read, func() { lines(data, func([]byte) {}) })
	began := time.Now()
	read()
	b.ReportMetric(float64(len(data))/1e6/time.Since(began).Seconds(), "MB/s")
}

// BenchmarkReceive: from the stream to a webhook, beside encoding/json alone
// on lines that bufio finds.
func BenchmarkReceive(b *testing.B) {
	const n = 100
	data := pushStream(n)
	duel(b, "event", n, func() {
		p := newParser(bytes.NewReader(data))
		for range n {
			m, err := p.next()
			if err != nil {
				b.Fatal(err)
			}
			if _, err := decodeWebhook("github", m.id, m.data); err != nil {
				b.Fatal(err)
			}
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

// TestCertificateIsForTheSource: a target does not learn who the client is towards
// its source, though it asks.
func TestCertificateIsForTheSource(t *testing.T) {
	t.Parallel()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, len(r.TLS.PeerCertificates))
	}))
	server.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	server.StartTLS()
	t.Cleanup(server.Close)
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	base := must(url.Parse(server.URL + "/subscribe/ci"))
	pair := (*authority)(nil).pair(t, nil)
	c := NewClient(ClientOptions{Source: base, Target: base, Roots: roots, Certificate: func() (*tls.Certificate, error) { return pair, nil }}, slog.New(slog.DiscardHandler))
	for transport, want := range map[*http.Transport]string{c.source: "1", c.target: "0"} {
		if got := post(t.Context(), transport, "GET", server.URL, ""); got.body != want {
			t.Errorf("%s certificates of %+v, want %s", got.body, got, want)
		}
		transport.CloseIdleConnections()
	}
}
