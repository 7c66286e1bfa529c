package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	goparser "go/parser"
	gotoken "go/token"
	"go/types"
	"io"
	"log"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// failing is a test that notes that it failed.
type failing struct {
	testing.TB
	failed bool
}

func (f *failing) Fatalf(string, ...any) {
	f.failed = true
	runtime.Goexit()
}

// TestWants: one line tells of all tests that were skipped; in CI none is.
func TestWants(t *testing.T) {
	t.Setenv("CI", "")
	w := &wants{tests: map[string]bool{}, how: map[string]string{}}
	for _, what := range []string{"sun", "rain", "sun"} {
		t.Run(what, func(t *testing.T) { w.skip(t, what, "wait for "+what) })
	}
	t.Setenv("CI", "true")
	f, done := &failing{TB: t}, make(chan struct{})
	go func() {
		defer close(done)
		w.skip(f, "snow", "wait for snow")
	}()
	<-done
	if want := "skipped 3 tests: no rain (wait for rain), no sun (wait for sun)"; w.String() != want || !f.failed {
		t.Errorf("line %q, want %q; in CI a test failed: %t", w, want, f.failed)
	}
}

// demoTranscript is all that a demo says by itself, as the README shows it.
func demoTranscript(t testing.TB) *regexp.Regexp {
	t.Helper()
	_, shown, _ := strings.Cut(readFile(t, "README.md"), "$ RELAY_MODE=demo go run .\n")
	shown, _, _ = strings.Cut(shown, "```")
	shape := regexp.QuoteMeta(shown)
	for _, differs := range []string{`:\d\d\d+`, `after \d+ ms`, `relay/\w+`, `Event-Id: \S+`} {
		shape = regexp.MustCompile(differs).ReplaceAllLiteralString(shape, differs)
	}
	return regexp.MustCompile("^" + shape + "$")
}

// logLine is a line of the log in JSON.
var logLine = regexp.MustCompile(`(?m)^\{"time":.*\n`)

// startDemo runs a demo until it has said what it says by itself.
func startDemo(t *testing.T, env ...string) (p *program, hook, page string) {
	t.Helper()
	p = begin(t, append([]string{"RELAY_MODE=demo"}, env...)...)
	eventually(t, "the demo has begun", func() bool { return isClosed(p.done) || strings.Contains(p.log.String(), "to end        Ctrl-C\n") })
	said := logLine.ReplaceAllString(p.log.String(), "")
	if want := demoTranscript(t); !want.MatchString(said) {
		t.Fatalf("the demo says\n%s\nwant\n%s", said, want)
	}
	urls := regexp.MustCompile(`http://\S+`).FindAllString(said, 2)
	return p, urls[0], urls[1]
}

// TestDemo: a demo shows one webhook's way and what comes after it, on ports that
// are free and on loopback alone, with nothing that a terminal would act on, and
// ends leaving nothing.
func TestDemo(t *testing.T) {
	for _, addr := range []string{":3000", ":9000"} { // if not this test, somebody else has them
		if l, err := net.Listen("tcp", addr); err == nil {
			defer l.Close()
		}
	}
	before := runtime.NumGoroutine()
	demo, hook, page := startDemo(t)
	if said := demo.log.String(); !demoTranscript(t).MatchString(said) {
		t.Errorf("it logs by itself:\n%s", said)
	}
	if strings.Contains(hook, ":3000/") || strings.Contains(page, ":9000/") {
		t.Errorf("%s or %s is taken", hook, page)
	}
	for _, address := range []string{hook, page} {
		_, port, _ := net.SplitHostPort(must(url.Parse(address)).Host)
		if conn, err := net.Dial("tcp", "127.0.0.2:"+port); err == nil { // which takes it to a listener on all addresses
			conn.Close()
			t.Errorf("%s is not on 127.0.0.1 alone", address)
		}
	}
	for _, tt := range []struct{ body, end string }{ // of what it says
		{"", ""},
		{"{\"é\":\"\\n\"}\r\n\t日本 😀\n\n", "\n\n  {\"é\":\"\\n\"}\n  \t日本 😀\n"},
		{"\x1b]0;x\x07\x9b1m\r\u202e\u2028\x00\xff\uFFFD\x7f", "\n  \\x1b]0;x\\a\\x9b1m\\r\\u202e\\u2028\\x00\\xff\uFFFD\\x7f\n"},
		{strings.Repeat("z", 100_000), "zzz\n  [cut: the body has 100000 bytes]\n"},
		{strings.Repeat("é", 3<<19), "é\\xc3\n  [cut: the body has 3145728 bytes]\n"},
	} {
		old := len(demo.log.String())
		if status, answer, _ := send(t, "POST", hook+"/more?x=1", tt.body); status != 200 || answer != "hello from the target\n" {
			t.Errorf("answer %d %q", status, answer)
		}
		said := demo.log.String()[old:]
		const begin = "\nthe target received\n\n  POST /webhooks/demo/hello/more?x=1 HTTP/1.1\n"
		if !strings.HasPrefix(said, begin) || !strings.HasSuffix(said, tt.end) || len(said) > 2*demoShown {
			t.Errorf("of %.80q it says, in %d bytes,\n%.6000s\nwant at the end\n%s", tt.body, len(said), said, tt.end)
		}
	}
	if err := demo.stop(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	eventually(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before })
}

// TestDemoSettings: what a user sets is in force, but for what would reach out of
// the process; a port that is asked for and taken is a failure.
func TestDemoSettings(t *testing.T) {
	ports := freePorts(t, 2)
	env := []string{fmt.Sprintf("SERVER_PORT=%d", ports[0]), fmt.Sprintf("HEALTH_SERVICE_PORT=%d", ports[1])}
	demo, hook, page := startDemo(t, append(env, "LOG_LEVEL=info", "LOG_FORMAT=json", "RESPONSE_MODE=demo=status", "AUTH_TOKEN=secret",
		"REDIS_URL=redis://127.0.0.1:1", "TARGET_BASE_URL=http://127.0.0.1:1", "SERVER_STREAM_MAX_AGE= ", "RELAY_TYPO=1",
		"SUBSCRIBE_ALLOWED_IPS=192.0.2.1", "WEBHOOKS_ALLOWED_IPS=192.0.2.1")...)
	got, want := hook+" "+page, fmt.Sprintf("http://127.0.0.1:%d/webhooks/demo/hello http://127.0.0.1:%d/", ports[0], ports[1])
	if status, answer, _ := send(t, "POST", hook, "{}"); status != 200 || answer != "" || got != want {
		t.Errorf("answer %d %q, want that of mode status; at %s, want %s", status, answer, got, want)
	}
	var warned []any
	for _, record := range slices.Concat(demo.log.lines("unknown variable"), demo.log.lines("variable has no effect")) {
		warned = append(warned, record["variable"])
	}
	if !slices.Equal(warned, []any{"RELAY_TYPO", "TARGET_BASE_URL", "REDIS_URL", "SUBSCRIBE_ALLOWED_IPS", "WEBHOOKS_ALLOWED_IPS"}) {
		t.Errorf("warned about %q", warned)
	}
	if n := len(demo.log.lines("stream ready")); n != 1 {
		t.Errorf("%d streams became ready, want 1 in the log", n)
	}
	for i, name := range []string{"SERVER_PORT", "HEALTH_SERVICE_PORT"} {
		err := run(t.Context(), []string{"RELAY_MODE=demo", env[i]}, io.Discard)
		if !errors.Is(err, syscall.EADDRINUSE) || !strings.HasSuffix(err.Error(), "("+name+")") {
			t.Errorf("%s is taken: error %v", name, err)
		}
	}
	complaint(t, "RELAY_MODE=demo", "SERVER_PORT=x")
	complaint(t, "RELAY_MODE=demo", "TARGET_STRIP_PREFIX=other=true")

	p := launch(t, []string{"RELAY_MODE=demo", "HEALTH_SERVICE_PORT=0", "LOG_LEVEL="})
	complete := func() bool { return demoTranscript(t).MatchString(logLine.ReplaceAllString(p.stderr.String(), "")) }
	eventually(t, "the demo has begun", complete)
	if code := p.code(t, os.Interrupt); code != 0 || !complete() {
		t.Errorf("Ctrl-C: exit code %d:\n%s", code, &p.stderr)
	}
}

// TestOneLineEach: a webhook is one line on each side, which name it as its
// provider knows it, and tell what became of it and nothing of what it says. What
// is tried again is what the operator says: 425, and not 503. One client serves all
// channels, and a target that is down or hangs stops no other.
func TestOneLineEach(t *testing.T) {
	t.Parallel()
	const slow = 20 * time.Millisecond
	var first sync.Map // paths that were there once
	release := make(chan string)
	hangs := newTarget(t, func(recorded) string { return <-release })
	t.Cleanup(func() { close(release) })
	target := newTarget(t, func(r recorded) string {
		time.Sleep(slow)
		path, _, _ := strings.Cut(strings.Fields(r.line)[1], "?")
		status := 201
		if _, again := first.LoadOrStore(path, true); !again && strings.HasSuffix(path, "/busy") {
			status = 425
		} else if strings.HasSuffix(path, "/broken") {
			status = 503
		}
		return fmt.Sprintf("HTTP/1.1 %d canary\r\nX-Canary: canary\r\nContent-Length: 6\r\n\r\ncanary", status)
	})
	down := "http://" + nobody
	server := startServer(t, "AUTH_TOKEN=canary", "RESPONSE_MODE=accept, s=status, r=response, sd=status, rd=response", "RESPONSE_TIMEOUT=9s, sd=2s, rd=2s",
		"HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT=1s")
	var sources []string
	for _, channel := range []string{"a", "s", "r", "ad", "sd", "rd", "hangs"} {
		sources = append(sources, "http://canary:canary@"+server.addr+"/subscribe/"+channel+"?k=canary")
	}
	secretly := func(base string) string { return strings.Replace(base, "://", "://canary:canary@", 1) }
	client := start(t, "RELAY_MODE=client", "AUTH_TOKEN=canary", "SOURCE_URL="+strings.Join(sources, ","), "TARGET_RETRY_WINDOW=4s", "RECONNECT_INTERVAL=50",
		"TARGET_RETRY_STATUSES=408, 425", "TARGET_TIMEOUT=10m", "TARGET_CONCURRENCY=1", "TARGET_STRIP_PREFIX=false, hangs=true",
		"HEALTH_SERVICE_PORT=0", "HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT=1s",
		fmt.Sprintf("TARGET_BASE_URL=%s/base?k=canary, hangs=%s, ad=%[3]s, sd=%[3]s, rd=%[3]s", secretly(target.url), hangs.url, secretly(down)))
	eventually(t, "all streams", func() bool { return len(client.log.lines("stream ready")) == len(sources) })
	for range 2 { // for a target that does not answer, which stops no other
		postAccepted(t, server, "hangs", "x")
	}
	if got := hangs.next(t).line; got != "POST /x HTTP/1.1" {
		t.Errorf("the target that hangs got %q", got)
	}

	// logged is the only line about event, and what is beside it is a try that was not the last.
	logged := func(t *testing.T, p *program, event string) (line map[string]any) {
		t.Helper()
		eventually(t, "a line", func() bool {
			line = nil
			for text := range strings.Lines(p.log.String()) {
				var record map[string]any
				if json.Unmarshal([]byte(text), &record) == nil && record["event"] == event && record["level"] != "DEBUG" && record["msg"] != "webhook will be forwarded again" {
					if line != nil {
						t.Fatalf("two lines about one webhook:\n%v\n%v", line, record)
					}
					line = record
				}
			}
			return line != nil
		})
		return line
	}
	const (
		accepted, answered, unanswered, refused = "INFO webhook accepted", "INFO webhook answered", "WARN webhook answered", "WARN webhook refused"
		forwarded, failing, givenUp             = "INFO webhook forwarded", "WARN webhook forwarded", "ERROR webhook given up"
	)
	for _, tt := range []struct {
		method, path   string
		told           int // the provider
		server, client string
		status         any // of the target
		attempt        int // 0: some
		reason         any
	}{
		{"POST", "/webhooks/a", 200, accepted, forwarded, 201, 1, nil},
		{"PUT", "/webhooks/a/x%2Fy//z", 200, accepted, forwarded, 201, 1, nil},
		{"POST", "/webhooks/a/broken", 200, accepted, failing, 503, 1, nil},
		{"POST", "/webhooks/a/busy", 200, accepted, forwarded, 201, 2, nil},
		{"POST", "/webhooks/ad/x", 200, accepted, givenUp, nil, 0, nil},
		{"POST", "/webhooks/s/x", 201, answered, forwarded, 201, 1, nil},
		{"POST", "/webhooks/s/broken", 503, unanswered, failing, 503, 1, nil},
		{"POST", "/webhooks/s/busy", 201, answered, forwarded, 201, 2, nil},
		{"POST", "/webhooks/sd/x", 502, refused, givenUp, nil, 0, "target unreachable"},
		{"PATCH", "/webhooks/r/x", 201, answered, forwarded, 201, 1, nil},
		{"POST", "/webhooks/r/broken", 503, unanswered, failing, 503, 1, nil},
		{"POST", "/webhooks/rd", 502, refused, givenUp, nil, 0, "target unreachable"},
	} {
		t.Run(tt.method+tt.path, func(t *testing.T) {
			var begin time.Time
			var status int
			var header http.Header
			for again := true; again; again = tt.told == 502 && status == 504 { // where the end of its time cut the last try short
				begin = time.Now()
				status, _, header = send(t, tt.method, "http://"+server.addr+tt.path+"?q=canary", `{"a":"canary"}`, "X-A", "canary", "Authorization", "Bearer canary", "User-Agent", "canary")
			}
			event := header.Get("X-Relay-Event-Id")
			if status != tt.told || event == "" {
				t.Fatalf("the provider was told %d %v, want %d with an id", status, header, tt.told)
			}
			channel, _, _ := strings.Cut(strings.TrimPrefix(tt.path, "/webhooks/"), "/")
			tells := func(line map[string]any, least time.Duration, what string, status, attempt, reason, target any) {
				t.Helper()
				var got []any
				for _, name := range []string{"channel", "method", "path", "bytes", "status", "attempt", "reason", "target"} {
					got = append(got, line[name])
				}
				want := fmt.Sprint(what, []any{channel, tt.method, tt.path, 14, status, attempt, reason, target})
				if got := fmt.Sprint(line["level"], " ", line["msg"], got); got != want {
					t.Errorf("the line tells %s, want %s", got, want)
				}
				ms, ok := line["ms"].(float64)
				if most := float64(time.Since(begin)) / 1e6; !ok || ms < float64(least)/1e6 || ms > most {
					t.Errorf("ms is %v, want a number between %v and %.1f", line["ms"], least, most)
				}
			}
			targetURL, atServer, atClient := target.url+"/base", time.Duration(0), slow
			if tt.status == nil {
				targetURL, atClient = down, 0
			} else if channel != "a" {
				atServer = slow
			}
			tells(logged(t, server, event), atServer, tt.server, tt.told, 1, tt.reason, nil)
			line := logged(t, client, event)
			if n, _ := line["attempt"].(float64); tt.attempt == 0 {
				tt.attempt = max(1, int(n))
			}
			tells(line, atClient, tt.client, tt.status, tt.attempt, nil, targetURL)
			if why, failed := line["err"].(string); failed != (tt.status == nil) || failed && !strings.Contains(why, "connection refused") {
				t.Errorf("err is %q", why)
			}
		})
	}
	_, metrics, _ := send(t, "GET", "http://"+client.health+"/metrics", "")
	for _, sample := range []string{`relay_forwards_total{channel="s",code="2xx"} 2`, `relay_forwards_in_flight{channel="hangs"} 1`, `code="unreachable"} `} {
		if !strings.Contains(metrics, sample) {
			t.Errorf("no %s in\n%s", sample, metrics)
		}
	}
	for _, p := range []*program{client, server} {
		p.stop()
		if at := strings.Index(p.log.String(), "canary"); at >= 0 {
			t.Errorf("the log tells of what a webhook says: %.200s", p.log.String()[max(0, at-100):])
		}
	}
}

// TestNoFalseAlarm: where nothing is wrong nothing is a warning: not that two
// clients share a channel, nor that one of them reports later than the other. Each
// tells from where and to where its webhooks go.
func TestNoFalseAlarm(t *testing.T) {
	t.Parallel()
	modes := []string{"accept", "response", "status"}
	var n atomic.Int64
	target := newTarget(t, func(recorded) string {
		time.Sleep(time.Duration(n.Add(1)%7) * 10 * time.Millisecond)
		return ok200
	})
	server := startServer(t, "AUTH_TOKEN=secret", "RESPONSE_MODE=accept, status=status, response=response")
	var sources, want []string
	for _, mode := range modes {
		sources = append(sources, "http://user:secret@"+server.addr+"/subscribe/"+mode+"/?k=secret")
		want = append(want, fmt.Sprintf("%[1]s from http://%[2]s/subscribe/%[1]s/ to %[3]s/base, for http://%[2]s/webhooks/%[1]s", mode, server.addr, target.url))
	}
	set := []string{"RELAY_MODE=client", "SOURCE_URL=" + strings.Join(sources, ","),
		"TARGET_BASE_URL=" + strings.Replace(target.url, "://", "://user:secret@", 1) + "/base?k=secret", "AUTH_TOKEN=secret", "SERVER_PORT="}
	programs := []*program{start(t, set...), start(t, set...), server}
	for _, client := range programs[:2] {
		eventually(t, "all streams", func() bool { return len(client.log.lines("stream ready")) == len(modes) })
		var ready []string
		for _, line := range client.log.lines("stream ready") {
			ready = append(ready, fmt.Sprintf("%s from %s to %s, for %s", line["channel"], line["source"], line["target"], line["webhooks"]))
		}
		if slices.Sort(ready); !slices.Equal(ready, want) {
			t.Errorf("ready are %q, want %q", ready, want)
		}
	}
	var senders sync.WaitGroup
	const webhooks = 50
	for i := range webhooks {
		senders.Go(func() {
			for _, mode := range modes {
				o := post(t.Context(), afresh, "POST", webhookURL(server, mode, strconv.Itoa(i)), "{}")
				if o.status != 200 {
					t.Errorf("%s: %+v", mode, o)
				}
			}
		})
	}
	senders.Wait()
	for range 2 * webhooks * len(modes) { // each client has each
		target.next(t)
	}
	time.Sleep(2 * takenDelay) // what is reported last
	for _, p := range programs {
		p.stop()
		for line := range strings.Lines(p.log.String()) {
			if !strings.Contains(line, `"level":"INFO"`) && !strings.Contains(line, `"level":"DEBUG"`) || strings.Contains(line, "secret") {
				t.Errorf("a false alarm, or a secret: %s", line)
			}
		}
	}
}

// webhook is compose for a body whose path does not matter.
func webhook(body string, headers ...string) string {
	return compose("POST /webhooks/m/x HTTP/1.1", body, headers...)
}

// everyByte is all values a byte can have.
var everyByte = func() string {
	b := make([]byte, 256)
	for i := range b {
		b[i] = byte(i)
	}
	return string(b)
}()

func gzipped(t testing.TB, text string) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	io.WriteString(z, text)
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// checkArrival compares what reached a target with what was sent to the relay. What
// belongs to the first hop does not cross: RFC 9110 section 7.6.1, framing, Host, and
// the names that are the relay's own. The original Host goes where receivers behind
// proxies look for it.
func checkArrival(t testing.TB, sent, got recorded) {
	t.Helper()
	method, requestTarget, _ := strings.Cut(sent.line, " ")
	requestTarget = requestTarget[:strings.LastIndex(requestTarget, " HTTP/")]
	if _, after, ok := strings.Cut(requestTarget, "http://"); ok {
		requestTarget = after[strings.IndexByte(after, '/'):] // the absolute form of the same target
	}
	if want := method + " " + requestTarget + " HTTP/1.1"; got.line != want {
		t.Errorf("request line %q, want %q", got.line, want)
	}
	if !bytes.Equal(got.body, sent.body) {
		t.Errorf("body of %d bytes begins %.200q, want %d bytes, %.200q", len(got.body), got.body, len(sent.body), sent.body)
	}
	hop := []string{
		"connection", "proxy-connection", "keep-alive", "te", "transfer-encoding", "upgrade", "trailer", "proxy-authenticate", "proxy-authorization",
		"content-length", "expect", "host", "x-relay-event-id", "x-relay-features", "x-forwarded-proto",
	}
	for name := range strings.SplitSeq(sent.get("Connection"), ",") {
		hop = append(hop, strings.ToLower(strings.TrimSpace(name)))
	}
	if host := sent.get("Host"); host != "" && sent.get("X-Forwarded-Host") == "" {
		sent.headers = append(slices.Clone(sent.headers), [2]string{"x-forwarded-host", host})
	}
	if got, want := got.fields("host", "content-length", "x-relay-event-id", "x-forwarded-proto"), sent.fields(hop...); !slices.Equal(got, want) {
		t.Errorf("headers\n%q\nwant\n%q", got, want)
	}
	own := recorded{headers: slices.DeleteFunc(slices.Clone(got.headers), func(h [2]string) bool {
		return !slices.Contains([]string{"host", "content-length", "x-relay-event-id"}, strings.ToLower(h[0]))
	})}
	length := fmt.Sprintf("content-length: %d\n", len(sent.body))
	if len(sent.body) == 0 {
		length = "(" + length + ")?"
	}
	want := regexp.MustCompile(`^` + length + `host: 127\.0\.0\.1:\d+\nx-relay-event-id: [^\n]{26,}$`) // 128 bits are 26 characters of base32
	if list := strings.Join(own.fields(), "\n"); !want.MatchString(list) {
		t.Errorf("the relay's own headers are\n%s", list)
	}
}

// silenced is the address of a proxy to a server that keeps from it what its
// clients announce, so that they get the legacy form.
func silenced(t testing.TB, server string) string {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	front := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(must(url.Parse("http://" + server)))
			r.Out.Header.Del("X-Relay-Features")
		},
		Transport: transport, FlushInterval: -1, ErrorLog: log.New(io.Discard, "", 0),
	})
	t.Cleanup(front.Close)
	return hostOf(front.URL)
}

// TestFidelity is the promise of the relay: bytes go in at a raw socket and
// the same bytes come out at one, in either form that they may have in between;
// the legacy form knows only POST and text.
func TestFidelity(t *testing.T) {
	t.Parallel()
	server := startServer(t, "SERVER_HEARTBEAT_INTERVAL=1m") // a client that is slow here must not take its stream for dead: the legacy form comes once
	target := newTarget(t, nil)
	startClient(t, server.addr, "m", target.url)
	legacy := newTarget(t, nil)
	startClient(t, silenced(t, server.addr), "m", legacy.url, "TARGET_CONCURRENCY=1")
	const chunked, text = "Transfer-Encoding: chunked", "Content-Type: text/plain"
	to := func(target string) string { return compose("POST "+target+" HTTP/1.1", "{}") }
	by := func(method, body string, headers ...string) string {
		return compose(method+" /webhooks/m/x HTTP/1.1", body, headers...)
	}

	tests := []struct{ name, request string }{
		// Bodies.
		{"all byte values", webhook(everyByte, "Content-Type: application/octet-stream")},
		{"all byte values without a type", webhook(everyByte)},
		{"invalid UTF-8 as JSON", webhook("{\"a\":\"\xff\xc3\x28\xed\xa0\x80\"}", "Content-Type: application/json; charset=utf-8")},
		{"JSON with odd spacing", webhook("\uFEFF{ \"b\" : 1.0e0,\t\"a\":\"\\u00e9\\/\" }\n\r\n\n", "Content-Type: application/json")},
		{"gzip that inflates to a second request", webhook(gzipped(t, strings.Repeat("x", 40)+"POST /admin HTTP/1.1\r\nHost: inner\r\nContent-Length: 0\r\n\r\n"), "Content-Encoding: gzip")},
		{"body that looks like a second request", webhook("POST /admin HTTP/1.1\r\nHost: inner\r\n\r\n", text)},
		{"form", webhook("x=1&x=2&a[b]=c&d=%e9+%zz&e;f", "Content-Type: application/x-www-form-urlencoded")},
		{"only a newline", webhook("\n", text)},
		{"lines of an event stream", webhook("data: x\n\nevent: ready\ndata: {}\r\r", text)},
		{"characters of all kinds", webhook("a\x00b \u2028\u2029 😀\U0010FFFF \"\\u0000\\\"<>&'", text)},
		{"3 MiB of binary, the default limit", webhook(strings.Repeat(everyByte, 3<<20/256))},
		{"3 MiB of newlines", webhook(strings.Repeat("\n", 3<<20), text)},
		{"3 MiB of control characters", webhook(strings.Repeat("\x01", 3<<20), text)},

		// Methods, with and without a body.
		{"empty POST", webhook("")},
		{"empty POST with its length", webhook("", "Content-Length: 0")},
		{"GET", compose("GET /webhooks/m/x?hub.challenge=1 HTTP/1.1", "")},
		{"GET with a body", by("GET", "{}")},
		{"HEAD", by("HEAD", "")},
		{"PUT", by("PUT", everyByte)},
		{"empty PUT", by("PUT", "")},
		{"DELETE", by("DELETE", "")},
		{"CONNECT", by("CONNECT", "")},
		{"an empty method of its own", by("M-SEARCH", "")},
		{"lower-case method", by("post", "{}")},

		// Headers.
		{"nothing but Host", webhook("{}")},
		{"header bytes from 80 to FF", webhook("{}", "X-Latin1: "+everyByte[0x80:], "X-Utf8: h\u00e9llo \u2028")},
		{"repeated headers", webhook("{}", "X-Dup: b", "x-dup: a", "X-Other: 1", "X-DUP: b", "X-Dup: c, d")},
		{"repeated cookies", webhook("{}", "Cookie: a=1", "Cookie: b=2; c=3", "Set-Cookie: s=1; Path=/", "Set-Cookie: t=2")},
		{"empty values", webhook("{}", "X-Empty: ", "Accept-Encoding: ", "Content-Type: ", "User-Agent: ")},
		{"repeated User-Agent", webhook("{}", "User-Agent: a", "User-Agent: b")},
		{"tabs and quotes inside", webhook("{}", "X-Text: a\tb  \"c\\\" ;,=")},
		{"odd names", webhook("{}", "x_under: 1", "X!#$%&'*+.^`|~: 2", "1: 3", "x--y: 4")},
		{"what net/http would add", webhook("{}", "User-Agent: GitHub-Hookshot/1", "Accept-Encoding: br;q=1.0, gzip", "Content-Type: ", "Date: yesterday")},
		{"what proxies add", webhook("{}", "X-Forwarded-For: 192.0.2.1, 192.0.2.2", "X-Forwarded-Proto: https", "Forwarded: for=192.0.2.1", "Via: 1.1 a", "X-Real-Ip: 192.0.2.1")},
		{"X-Forwarded-Host that is there", webhook("{}", "X-Forwarded-Host: outer.example")},
		{"credentials, conditions and ranges", webhook("{}", "Authorization: Basic YTpi", "X-Auth-Token: t", "If-None-Match: \"x\"", "Range: bytes=0-1", "Cache-Control: no-cache", "Pragma: no-cache")},
		{"names in Connection", webhook("{}", "Connection: X-Hop, close ,x-other-hop", "X-Hop: 1", "X-Other-Hop: 2", "X-Stays: 3")},
		{"the fixed hop-by-hop list", webhook("{}", "Keep-Alive: timeout=5", "Proxy-Connection: keep-alive", "TE: trailers", "Upgrade: websocket", "Proxy-Authorization: Basic YTpi", "Proxy-Authenticate: Basic")},
		{"names of the relay", webhook("{}", "X-Relay-Event-Id: forged", "X-Relay-Features: respond")},
		{"a long value", webhook("{}", "X-Long: "+strings.Repeat("v", 12<<10))},
		{"many headers", webhook("{}", slices.Repeat([]string{"X-Many: 1"}, fieldLimit-1)...)},

		// Request targets.
		{"missing tail", to("/webhooks/m")},
		{"empty tail", to("/webhooks/m/")},
		{"slashes, doubled and escaped", to("/webhooks/m//a//b%2Fc%2fd/")},
		{"reserved characters", to("/webhooks/m/a;v=1/b;;c/a:b@c!$&'()*+,=")},
		{"characters that should be escaped", to("/webhooks/m/\"<>^`{|}?q=\"<>^`{|}\\#f%00%0d%0a")},
		{"escapes, needless and not", to("/webhooks/m/%41%7e%25%3F%23%E9%ff%C3%a9")},
		{"bare bytes", to("/webhooks/m/\xc3\xa9\xff?q=\xe9\xff")},
		{"dots that are no segments", to("/webhooks/m/...//.a/a../..a/.well-known")},
		{"raw query", to("/webhooks/m/x?x=1;y=2&sig=%zz&a[b]=c&__proto__[x]=1")},
		{"trailing question mark", to("/webhooks/m/x?")},
		{"several question marks", to("/webhooks/m?a=b?c=/../d&??")},
		{"fragment", to("/webhooks/m/x#frag")},
		{"absolute form", to("http://relay.example.com/webhooks/m/a%2fb?x=%zz")},
		{"long target", to("/webhooks/m/" + strings.Repeat("p/", 2<<10) + "?" + strings.Repeat("q=1&", 2<<10))},

		// Senders.
		{"chunks", webhook("5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", chunked)},
		{"chunks with extensions and a trailer", webhook("5;a=b\r\nhello\r\n0\r\nX-Checksum: 1\r\n\r\n", chunked, "Trailer: X-Checksum")},
		{"empty chunked body", webhook("0\r\n\r\n", chunked)},
		{"100-continue", webhook("{}", "Expect: 100-continue")},
		{"HTTP/1.0", compose("POST /webhooks/m/x?a HTTP/1.0", everyByte)},
		{"HTTP/1.0 without Host", "POST /webhooks/m/x HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}"},
		{"empty Host", "POST /webhooks/m/x HTTP/1.1\r\nHost: \r\nContent-Length: 2\r\n\r\n{}"},
		{"Host with a port", "POST /webhooks/m/x HTTP/1.1\r\nHost: relay.example.com:8443\r\nContent-Length: 2\r\n\r\n{}"},
	}
	ids := map[string]bool{}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			sent := must(readRecorded(bufio.NewReader(strings.NewReader(test.request))))
			if status, answer, _ := wire(t, server.addr, test.request); status != 200 || answer != "" {
				t.Fatalf("answer %d %q, want 200 and nothing", status, answer)
			}
			got := target.next(t)
			checkArrival(t, sent, got)
			if proto, want := got.get("X-Forwarded-Proto"), cmp.Or(sent.get("X-Forwarded-Proto"), "http"); proto != want {
				t.Errorf("X-Forwarded-Proto %q, want %q", proto, want)
			}
			if ids[got.get("X-Relay-Event-Id")] {
				t.Errorf("id %q came twice", got.get("X-Relay-Event-Id"))
			}
			ids[got.get("X-Relay-Event-Id")] = true
			_, rest, _ := strings.Cut(sent.line, " ")
			sent.line = "POST " + rest
			if !utf8.Valid(sent.body) { // it has no place for such a body that legacy programs know
				sent.body = nil
			}
			checkArrival(t, sent, legacy.next(t))
		})
	}

	// As an ingress sends that speaks HTTP/2 without TLS: with its length, and as a stream of unknown length.
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: &protocols, DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	const requestTarget = "/webhooks/m/a%2Fb//c?x=1;y=2&sig=%zz"
	for _, body := range []io.Reader{strings.NewReader(everyByte), io.MultiReader(strings.NewReader(everyByte))} {
		req := requestOf(t.Context(), "PUT", "http://"+server.addr+requestTarget, body, "X-Dup", "b", "X-Dup", "a", "X-Latin1", everyByte[0x80:], "User-Agent", "")
		req.Host = "relay.example.com"
		resp := must(transport.RoundTrip(req))
		resp.Body.Close()
		if resp.StatusCode != 200 || resp.ProtoMajor != 2 {
			t.Fatalf("%s %s, want 200 over HTTP/2", resp.Proto, resp.Status)
		}
		checkArrival(t, recorded{
			"PUT " + requestTarget + " HTTP/1.1", [][2]string{{"X-Dup", "b"}, {"X-Dup", "a"}, {"X-Latin1", everyByte[0x80:]}, {"Host", "relay.example.com"}}, []byte(everyByte),
		}, target.next(t))
	}
	if n := len(target.got); n > 0 {
		t.Errorf("%d requests more than were sent reached the target: %q", n, target.next(t).line)
	}
}

// newSource is a source under the test's control. serve answers the n-th
// subscription, counted from 0; a stream ends when it returns.
func newSource(t testing.TB, serve func(n int, w http.ResponseWriter, r *http.Request)) *httptest.Server {
	t.Helper()
	var n atomic.Int64
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		serve(int(n.Add(1)-1), w, r)
	}))
	t.Cleanup(source.Close)
	return source
}

// readyBlock announces an interval that lets a test wait in peace.
const readyBlock = "id: 0\nevent: ready\ndata: {\"heartbeatInterval\":60000}\n\n"

func tell(w http.ResponseWriter, blocks ...string) {
	w.Header().Set("Content-Type", "text/event-stream")
	for _, b := range blocks {
		io.WriteString(w, b)
	}
	http.NewResponseController(w).Flush()
}

// dataBlock is a webhook as a source sends it.
func dataBlock(message any) string {
	data, _ := json.Marshal(message)
	return "data: " + string(data) + "\n\n"
}

// steady is a source with one stream of blocks that then stays open.
func steady(t testing.TB, blocks ...string) *httptest.Server {
	t.Helper()
	return newSource(t, func(_ int, w http.ResponseWriter, r *http.Request) {
		tell(w, append([]string{readyBlock}, blocks...)...)
		<-r.Context().Done()
	})
}

// TestChannelsAreOnlyNames: no channel reaches anything inside the server,
// whether somebody listens on it or not.
func TestChannelsAreOnlyNames(t *testing.T) {
	t.Parallel()
	server := startServer(t)
	for _, name := range []string{"ready", "error", "removeListener", "message", "heartbeat", "drain", "__proto__", "responses", "~", "...", strings.Repeat("c", 128)} {
		postAccepted(t, server, name, "unheard") // a fresh server keeps what may yet be heard
		stream := openFeed(t, server, name)
		stream.only(t, "unheard")
		postAccepted(t, server, name, "heard")
		stream.only(t, "heard")
	}
}

// reading is a relay whose every published event and every forwarded request
// is looked at: one server, and one client of the channel demo whose target has
// the base path /base.
type reading struct {
	*rig
	addr   string
	target *target
	ends   int

	noting    sync.Mutex
	published [][2]string // guarded by noting: channel and path
}

func newReading(t testing.TB) *reading {
	t.Helper()
	l := loopback(t)
	r := &reading{addr: l.Addr().String(), target: newTarget(t, nil)}
	r.rig = newRigOn(t, l, func(h *Hub) Bus {
		return stubBus{h, func(ctx context.Context, e *Event) (int, error) {
			m, _ := newParser(bytes.NewReader(block(e.chunk))).next()
			w, err := decodeOwn(m.name, m.id, m.data)
			if err != nil {
				return 0, err
			}
			r.noting.Lock()
			r.published = append(r.published, [2]string{e.Channel, w.Path})
			r.noting.Unlock()
			return h.Publish(ctx, e)
		}, nil}
	})
	c := newClientOf(t, "http://"+r.addr+"/subscribe/demo/", r.target.url+"/base", "TARGET_CONCURRENCY=1")
	running(t, c.Run)
	eventually(t, "the client is ready", func() bool { return c.Check(t.Context()) == nil })
	return r
}

// http1 sends a request line and returns the status; 0 when there is no answer.
func (r *reading) http1(t testing.TB, method, target string) int {
	t.Helper()
	conn := connect(t, r.addr)
	defer conn.Close()
	io.WriteString(conn, method+" "+target+" HTTP/1.1\r\nHost: relay\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
	conn.(*net.TCPConn).CloseWrite()
	var answer []byte
	for b := make([]byte, 4096); !bytes.Contains(answer, []byte("text/event-stream")); { // a stream is no webhook
		n, err := conn.Read(b)
		answer = append(answer, b[:n]...)
		if err != nil {
			break
		}
	}
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(answer)), &http.Request{Method: method})
	if err != nil {
		return 0
	}
	return resp.StatusCode
}

// http2 is http1 over HTTP/2, where target is :path, or, for CONNECT, :authority.
func (r *reading) http2(t testing.TB, method, target string) int {
	t.Helper()
	fields := asked(method, target)
	if method == "CONNECT" {
		fields = []string{":method", method, ":authority", target}
	}
	conn := connect(t, r.addr)
	defer conn.Close()
	status, _ := askHTTP2(conn, fields...)
	return status
}

// arrived is what has reached the target, once a webhook that comes after it
// all has; base and the channel are checked of each, and so is what was
// published.
func (r *reading) arrived(t testing.TB) (lines []string) {
	t.Helper()
	r.ends++
	end := fmt.Sprintf("/webhooks/demo/end/%d", r.ends)
	if status := r.http1(t, "POST", end); status != 200 {
		t.Fatalf("the last webhook got %d", status)
	}
	for line := r.target.next(t).line; line != "POST /base"+end+" HTTP/1.1"; line = r.target.next(t).line {
		lines = append(lines, line)
		_, path, _ := strings.Cut(line, " /base")
		path, _, _ = strings.Cut(strings.TrimSuffix(path, " HTTP/1.1"), "?")
		if !below(path, "/webhooks/demo") || !confined("/webhooks/demo", strings.TrimPrefix(path, "/webhooks/demo")) || strings.Contains(path, " ") {
			t.Errorf("the target got %q", line)
		}
	}
	r.noting.Lock()
	defer r.noting.Unlock()
	for _, e := range r.published {
		if !below(e[1], "/webhooks/"+e[0]) {
			t.Errorf("on channel %q was published %q", e[0], e[1])
		}
	}
	r.published = nil
	return lines
}

// targets are methods and request targets of every kind, by what becomes of them:
// forwarded, taken for a channel that nobody listens on, or refused.
var targets = map[string][]string{
	"forwarded": {
		"POST /webhooks/demo", "POST http://h/webhooks/demo/x", "POST HTTPS://h/webhooks/demo", "POST http://h:1/webhooks/demo/x?y://z/w",
		"POST http://[::1]/webhooks/demo//x", "POST /webhooks/demo/http://h/x", "POST /webhooks/demo?/../../x",
	},
	"taken": {"POST /webhooks/other/x", "POST http://h/webhooks/other?/webhooks/demo"},
	"400": {
		"GET http:/webhooks/demo?://h/admin/config", "POST http:/webhooks/demo/x://h/admin", "POST zz://h/webhooks/demo/x", "POST http:webhooks/demo",
		"POST http:///webhooks/demo/x", "POST http://h", "POST http://h?://i/webhooks/demo/x", "POST ?/webhooks/demo", "POST webhooks/demo",
		"CONNECT evil/webhooks/demo/x://h/run", "CONNECT http://h/webhooks/demo/../x", "CONNECT h:80", "GET /webhooks/de%6do/x", "GET /webhooks/demo%2fx",
		"POST /webhooks/other/../demo/x", "POST /webhooks/demo/../../admin", "POST /webhooks/demo/..%2f..%2fadmin", "POST /webhooks/demo/..;/admin",
		"POST /webhooks/demo#/x", "POST /webhooks/demo\\..\\..\\admin", "POST http://h/webhooks/demo/../../admin",
	},
	"404": {
		"POST *", "OPTIONS *", "GET /webhooks%2Fde%6do/x", "GET /%77ebhooks/demo/x", "POST //webhooks/demo/x", "POST /x?/webhooks/demo/x", "POST /./webhooks/demo/x",
	},
}

// TestOneReading: a request target is read once. What reaches the target is
// below the base and the channel that the request was routed to, byte for byte,
// or it is refused.
func TestOneReading(t *testing.T) {
	r := newReading(t)
	authority := regexp.MustCompile("(?i)^https?://[^/]+")
	for name, ask := range map[string]func(testing.TB, string, string) int{"HTTP1": r.http1, "HTTP2": r.http2} {
		for fate, requests := range targets {
			for _, request := range requests {
				method, target, _ := strings.Cut(request, " ")
				status, want := 200, []string(nil)
				if n, err := strconv.Atoi(fate); err == nil {
					status = n
				} else if fate == "forwarded" {
					want = []string{method + " /base" + authority.ReplaceAllString(target, "") + " HTTP/1.1"}
				}
				got := ask(t, method, target)
				if name == "HTTP2" && got == 0 && !strings.HasPrefix(target, "/") {
					status, want = 0, nil // net/http takes no such path there
				}
				if lines := r.arrived(t); got != status || !slices.Equal(lines, want) {
					t.Errorf("%s, %s: status %d, want %d; the target got %q, want %q", name, request, got, status, lines, want)
				}
			}
		}
	}
}

// FuzzRequestTarget: for any bytes as a request target, over HTTP/1.1 and
// HTTP/2, what reaches the target is below its base and /webhooks/{channel}, and
// the channel is the one it was published on.
func FuzzRequestTarget(f *testing.F) {
	for _, fate := range slices.Sorted(maps.Keys(targets)) {
		for _, request := range targets[fate] {
			method, target, _ := strings.Cut(request, " ")
			f.Add(method, target)
		}
	}
	for _, tc := range pathCases {
		f.Add("POST", "/webhooks/demo"+tc.path)
		f.Add("POST", "http:/webhooks/demo?://h"+tc.path)
	}
	f.Add("POST", "/webhooks/demo/x HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\nPOST http:/webhooks/demo?://h/admin")
	f.Add("GET", "/subscribe/demo")
	f.Add("GET", "/webhooks/\xff/x")
	f.Add("", "")
	r := newReading(f)
	f.Fuzz(func(t *testing.T, method, target string) {
		if len(method)+len(target) > 8<<10 {
			t.Skip("longer than a header may be, sooner or later")
		}
		r.http1(t, method, target)
		r.http2(t, method, target)
		r.arrived(t)
	})
}

// TestHostileSource: a client does not trust its source. What it sends stays
// at the target's host, below its base path, in a request of one reading.
func TestHostileSource(t *testing.T) {
	t.Parallel()
	type object = map[string]any
	const line = "POST /webhooks/m/h HTTP/1.1\n"
	blocks := []string{"data\n\n", "data: {\n\n", "data: {\"originalUrl\":\"/webhooks/m/x\"} {\n\n"} // first those that are refused
	n := 0
	both := func(target string) []string {
		n++
		return []string{dataBlock(object{"originalUrl": target}), httpBlock(fmt.Sprint("t", n), "POST "+target+" HTTP/1.1\n", "")}
	}
	for _, target := range []string{
		"/webhooks/m/../x", "/webhooks/m/a/..", "/webhooks/m/a/%2e%2E/x", "/webhooks/m/a%2f..%2fx", "/webhooks/m/..;a/x", "http://a/webhooks/m/../x", `/webhooks/m/..\x`,
		"/webhooks/m/%5c%5cevil.example/x", "/webhooks/m/a\x00", "/webhooks/m/a%00", "/webhooks/m/a HTTP/1.1\r\nHost: evil.example\r\n\r\n", "/webhooks/m/a?\r\nX: y",
		"/webhooks/m/a?b c", "/webhooks/m/%zz", "/webhooks/m/\u0142", "http://evil.example", "", "*", "@evil.example/x", "evil.example:80", "//evil.example/webhooks/m/x?y",
		"/webhooks/other/x", "http://a/webhooks/other/x", "/webhooks/mm/x", "/admin", "http:/webhooks/m?://h/admin", "/webhooks/%6d/x", "/webhooks?/m/x", "file:///webhooks/m/passwd",
	} {
		blocks = append(blocks, both(target)...)
	}
	for _, message := range []any{
		nil, 1, object{}, object{"originalUrl": 1}, object{"originalUrl": "/webhooks/m/h", "headers": []string{"x"}}, object{"originalUrl": "/webhooks/m/h", "body": object{"a": 1}},
	} {
		blocks = append(blocks, dataBlock(message))
	}
	for name, value := range map[string]any{"x": "a\r\nX-Evil: 1", "y": []string{"a", "b\nc"}, "z": "a\x00", "x\r\nX-Evil": "1", "x: y": "1", "": "1", "u": "\u0142"} {
		blocks = append(blocks, dataBlock(object{"originalUrl": "/webhooks/m/h", "headers": object{name: value}}))
	}
	blocks = append(blocks,
		httpBlock("m1", " /webhooks/m/m HTTP/1.1\n", ""), httpBlock("m2", "GET / HTTP/1.1\nX: y\n\nGET /webhooks/m/m HTTP/1.1\n", ""),
		httpBlock("m3", "GET /admin /webhooks/m/m HTTP/1.1\n", ""), httpBlock("m4", "GET /webhooks/m/m HTTP/1.0\n", ""), httpBlock("m5", line+"X: a\n X-Evil: 1\n", ""),
		httpBlock("m6", line+"X-Evil : 1\n", ""), httpBlock("m7", line+"X: \x00\n", ""), httpBlock("m8", line+"X-Relay-Body: base64\n", "*"), httpBlock("a/../b", line, ""),
		"id: m9\nevent: webhook\ndata: GET /webhooks/m/m HTTP/1.1\ndata: Content-Length: 1\ndata:\ndata: ab\n\n", // another length, none, and no id
		"id: m10\nevent: webhook\ndata: GET /webhooks/m/m HTTP/1.1\ndata:\ndata: ab\n\n",
		"event: webhook\nid\ndata: POST /webhooks/m/h HTTP/1.1\ndata: Content-Length: 0\ndata:\ndata:\n\n")
	refused := float64(len(blocks))

	framing := object{
		"content-length": "9999", "Content-Length": []string{"1", "2"}, "transfer-encoding": "chunked", "Transfer-Encoding": "identity", "host": "evil.example",
		"connection": "close, x-hop", "x-hop": "1", "upgrade": "h2c", "expect": "100-continue", "te": "gzip", "trailer": "X",
	}
	blocks = append(blocks, "retry: 999999999999\n\n")
	blocks = slices.Concat(blocks, both("/webhooks/m/@evil.example/x"), both("/webhooks/m//evil.example/x?y"), both("http://evil.example/webhooks/m/x?y"), []string{
		dataBlock(object{"originalUrl": "/webhooks/m/m", "method": "GET /admin"}), // which the legacy form does not have
		httpBlock("m11", "GET /webhooks/m/m HTTP/1.1\nX: a\rX-Evil: 1\n", ""),     // CR ends a line of the stream
		dataBlock(object{"originalUrl": "/webhooks/m/f", "body": "ab", "headers": framing}),
		httpBlock("m12", "PUT /webhooks/m/f HTTP/1.1\nTransfer-Encoding: chunked\nHost: evil.example\nConnection: close, x-hop\nX-Hop: 1\nUpgrade: h2c\n"+
			"Expect: 100-continue\nTE: gzip\nTrailer: X\n", "ab"),
		dataBlock(object{"originalUrl": "/webhooks/m/redirect"}), // to a path with two slashes, which begin no host
	})
	lines := []string{
		"POST /webhooks/m/@evil.example/x", "POST /webhooks/m/@evil.example/x", "POST /webhooks/m//evil.example/x?y", "POST /webhooks/m//evil.example/x?y",
		"POST /webhooks/m/x?y", "POST /webhooks/m/x?y", "POST /webhooks/m/m", "GET /webhooks/m/m", "POST /webhooks/m/f", "PUT /webhooks/m/f",
		"POST /webhooks/m/redirect", "POST //evil.example/x",
	}
	source := steady(t, blocks...)
	for _, base := range []string{"/base", ""} {
		target := newTarget(t, func(r recorded) string {
			if !strings.Contains(r.line, "/redirect ") {
				return ok200
			}
			return "HTTP/1.1 307 Redirect\r\nContent-Length: 0\r\nLocation: http://" + r.get("Host") + base + "//evil.example/x\r\n\r\n"
		})
		client := startClient(t, hostOf(source.URL), "m", target.url+base, "TARGET_CONCURRENCY=1", "HEALTH_SERVICE_PORT=0")
		for _, line := range lines {
			r := target.next(t)
			if want := strings.Replace(line, " ", " "+base, 1) + " HTTP/1.1"; r.line != want {
				t.Errorf("target got %q, want %q", r.line, want)
			}
			if strings.HasSuffix(line, "/f") && string(r.body) != "ab" {
				t.Errorf("%s: body %q, want its own two bytes", line, r.body)
			}
			for _, name := range []string{"X-Evil", "X-Hop", "Connection", "Transfer-Encoding", "Upgrade", "Expect", "Te", "Trailer"} {
				if value := r.get(name); value != "" || r.get("Host") != hostOf(target.url) {
					t.Errorf("%s: %s: %s and Host: %s reached the target", line, name, value, r.get("Host"))
				}
			}
		}
		checkMetrics(t, client, map[string]float64{"relay_events_invalid_total": refused})
	}
}

// TestCertificatesAreVerified: a token does not turn verification off, and
// TARGET_INSECURE_SKIP_VERIFY is for the target alone.
func TestCertificatesAreVerified(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	target := newTLSServer(t, func(http.ResponseWriter, *http.Request) { asked.Add(1) })
	answer := func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		tell(w, readyBlock, dataBlock(map[string]string{"originalUrl": "/webhooks/m/x"}))
		<-r.Context().Done()
	}
	source := newTLSServer(t, answer)
	plain := newSource(t, func(_ int, w http.ResponseWriter, r *http.Request) { answer(w, r) })
	for _, tt := range []struct {
		source, set, said string
		asked             int64 // who
	}{
		{source.URL, "TARGET_INSECURE_SKIP_VERIFY=true", "no stream from the source", 0},
		{plain.URL, "", "webhook given up", 1},
		{plain.URL, "TARGET_INSECURE_SKIP_VERIFY=true", "webhook forwarded", 2},
		{source.URL, "CA_FILE=" + writePEM(t, "CERTIFICATE", source.Certificate().Raw), "webhook forwarded", 2}, // both servers'
	} {
		asked.Store(0)
		client := start(t, "RELAY_MODE=client", "SOURCE_URL="+tt.source+"/subscribe/m/", "TARGET_BASE_URL="+target.URL,
			"RECONNECT_INTERVAL=1", "TARGET_RETRY_WINDOW=0", "AUTH_TOKEN=secret", tt.set)
		line := client.wait(tt.said)[0]
		client.stop()
		if why, failed := line["err"].(string); asked.Load() != tt.asked || failed != (tt.asked < 2) || failed && !strings.Contains(why, "certificate") {
			t.Errorf("%+v: %d were asked, and the client says %v", tt, asked.Load(), line)
		}
	}
}

// TestCertificatesForClients is the main path between a server and a client that
// know each other by certificates, while those of the client and who issues them
// are renewed. A client without one has no stream, and a provider needs none.
func TestCertificatesForClients(t *testing.T) {
	t.Parallel()
	serverCert, serverKey, ca, cert, key := tokensFile(t, ""), tokensFile(t, ""), tokensFile(t, ""), tokensFile(t, ""), tokensFile(t, "")
	first, second := newAuthority(t, nil), newAuthority(t, nil)
	writeCertificate(t, serverCert, serverKey, 1)
	replace(t, ca, first.pem)
	writePair(t, cert, key, first.pair(t, nil))
	server := startServer(t, "SERVER_TLS_CERT_FILE="+serverCert, "SERVER_TLS_KEY_FILE="+serverKey, "SERVER_TLS_CLIENT_CA_FILE="+ca)
	if len(server.log.lines("anybody may subscribe: neither AUTH_TOKEN nor AUTH_TOKENS_FILE is set")) != 0 {
		t.Error("the server says that anybody may subscribe")
	}
	target := newTarget(t, nil)
	env := []string{"RELAY_MODE=client", "TARGET_BASE_URL=" + target.url, "SOURCE_URL=https://" + server.addr + "/subscribe/m", "CA_FILE=" + serverCert, "RECONNECT_INTERVAL=50"}
	without := start(t, env...)
	if got := without.wait("no stream from the source")[0]; got["level"] != "ERROR" || !strings.Contains(fmt.Sprint(got["err"]), "401") {
		t.Errorf("without a certificate: %v", got)
	}
	without.stop()
	client := start(t, append(env, "SOURCE_TLS_CERT_FILE="+cert, "SOURCE_TLS_KEY_FILE="+key)...)
	arrives := func(name string, streams int, pairs ...tls.Certificate) {
		t.Helper()
		eventually(t, "streams", func() bool { return len(client.log.lines("stream ready")) == streams })
		transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: pairs}, DisableKeepAlives: true}
		if got := post(t.Context(), transport, "POST", "https://"+server.addr+"/webhooks/m/"+name, "{}"); got.status != 200 {
			t.Errorf("%s: %+v", name, got)
		}
		if got := target.next(t); got.line != "POST /webhooks/m/"+name+" HTTP/1.1" || got.get("X-Forwarded-Proto") != "https" {
			t.Errorf("target got %q by %q", got.line, got.get("X-Forwarded-Proto"))
		}
	}
	arrives("of-nobody", 1)
	arrives("of-a-stranger", 1, *second.pair(t, nil))
	writePair(t, cert, key, second.pair(t, nil)) // the stream is still that of the old one
	arrives("before", 1)
	replace(t, ca, second.pem)
	arrives("after", 2)
	if n := len(client.log.lines("no stream from the source")); n != 0 {
		t.Errorf("%d tries were refused", n)
	}
}

// TestLegacyServerDrivesClient: the frames of the program this one succeeds.
// Their ids count anew on every stream, there is no method, and the headers
// describe the first hop.
func TestLegacyServerDrivesClient(t *testing.T) {
	t.Parallel()
	const sample = `{"headers":{"host":"127.0.0.1:3000","user-agent":"probe/1.0","content-type":"application/json","x-dup":"one, two","set-cookie":["s1","s2"],"cookie":"c1; c2","content-length":"13"},` +
		`"originalUrl":"/webhooks/x/push-github?a=1&b=2&b=3","path":"/webhooks/x/push-github","query":{"a":"1","b":["2","3"]},"body":"{\"test\":true}","timestamp":1700000000000}`
	const inflated = `{"headers":{"host":"relay.example.com","content-encoding":"gzip","content-length":"3","x-latin1":"\u00e9\u00ff","transfer-encoding":"chunked","trailer":"X","connection":"close"},` +
		`"originalUrl":"http://relay.example.com/webhooks/x/\u00e9?q=%zz;r","path":"/webhooks/x/\u00e9","query":{},"body":"inflated","timestamp":1700000000000}`
	const object = `{"headers":{"content-type":"text/plain","content-length":"99"},"originalUrl":"/webhooks/x/?","path":"/webhooks/x/","query":{},"body":"[object Object]","timestamp":1700000000000}`
	asked := make(chan string, 10)
	source := newSource(t, func(n int, w http.ResponseWriter, r *http.Request) {
		asked <- fmt.Sprint(r.Method, r.URL, r.Header["X-Auth-Token"], r.Header["Accept"], r.Header["X-Relay-Features"])
		tell(w, "id: 0\nevent: ready\ndata: {\"heartbeatInterval\":5000}\n\n", "id: 1\nevent: heartbeat\ndata: {}\n\n")
		if n == 0 {
			tell(w, "id: 2\ndata: "+sample+"\n\nid: 3\ndata: "+inflated+"\n\n")
			panic(http.ErrAbortHandler) // it ends its streams without a last chunk
		}
		tell(w, "id: 2\ndata: "+object+"\n\nid: 3\ndata: "+sample+"\n\n")
		<-r.Context().Done()
	})
	target := newTarget(t, nil)
	client := startClient(t, hostOf(source.URL), "x", target.url, "AUTH_TOKEN=tok\xe9n", "TARGET_CONCURRENCY=1")
	push := recorded{
		"POST /webhooks/x/push-github?a=1&b=2&b=3 HTTP/1.1",
		[][2]string{{"host", "127.0.0.1:3000"}, {"user-agent", "probe/1.0"}, {"content-type", "application/json"}, {"x-dup", "one, two"}, {"set-cookie", "s1"}, {"set-cookie", "s2"}, {"cookie", "c1; c2"}},
		[]byte(`{"test":true}`),
	}
	ids := map[string]bool{}
	for _, sent := range []recorded{
		push,
		{"POST /webhooks/x/\xe9?q=%zz;r HTTP/1.1", [][2]string{{"host", "relay.example.com"}, {"content-encoding", "gzip"}, {"x-latin1", "\xe9\xff"}}, []byte("inflated")},
		{"POST /webhooks/x/? HTTP/1.1", [][2]string{{"content-type", "text/plain"}}, []byte("[object Object]")},
		push,
	} {
		got := target.next(t)
		checkArrival(t, sent, got)
		ids[got.get("X-Relay-Event-Id")] = true
	}
	if got, want := <-asked, "GET/subscribe/x/ [tok\xe9n] [text/event-stream] [http, respond, drain]"; got != want || len(ids) != 4 || len(client.log.lines("event refused")) > 0 {
		t.Errorf("asked %q, want %q; %d ids for 4 webhooks; none may be refused", got, want, len(ids))
	}
}

// Configuration.

// mistaken holds wrong values of every variable, of which those that take any text have none.
var mistaken = map[string][]string{
	"RELAY_MODE": nil, "SERVER_TLS_CERT_FILE": nil, "SERVER_TLS_KEY_FILE": nil, "SOURCE_TLS_CERT_FILE": nil, "SOURCE_TLS_KEY_FILE": nil, // see TestMistakes
	"REDIS_CHANNEL_PREFIX": nil, "REDIS_MAX_RETRIES_PER_REQUEST": nil, "REDIS_ENABLE_OFFLINE_QUEUE": nil, "REDIS_ENABLE_READY_CHECK": nil, "NO_PROXY": nil,
	"AUTH_TOKEN":                              {"hunter2\x01", "", "  ", "\t \t", "\n"},
	"AUTH_TOKENS_FILE":                        {"/nonexistent"},
	"WEBHOOK_SECRETS_FILE":                    {"/nonexistent"},
	"SERVER_TLS_CLIENT_CA_FILE":               {"/nonexistent"},
	"LOG_LEVEL":                               {"loud"},
	"LOG_FORMAT":                              {"xml"},
	"HEALTH_SERVICE_PORT":                     {"65536"},
	"HEALTH_SERVICE_DETECT_KUBERNETES":        {"maybe"},
	"HEALTH_SERVICE_SHUTDOWN_DELAY":           {"-1"},
	"HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT": {"0"},
	"SERVER_PORT":                             {"http", "tcp://10.0.0.1:3000"}, // a Service named server, by links
	"SERVER_MAX_PAYLOAD_SIZE_LIMIT":           {"abc", "0", "nan", "inf", "mb"},
	"SERVER_HEARTBEAT_INTERVAL":               {"abc", "0", "99", "1e3", "99999999999999999999"},
	"SERVER_MAX_SUBSCRIBERS":                  {"0"},
	"SERVER_MAX_SUBSCRIBERS_PER_ADDRESS":      {"1.5"},
	"SERVER_SUBSCRIBER_BUFFER":                {"16 m"},
	"SERVER_HELD_BUFFER":                      {"-1mb"},
	"SERVER_HOLD_TIME":                        {"1s"},
	"SERVER_STREAM_MAX_AGE":                   {"10ms"},
	"RESPONSE_MODE":                           {"slack=maybe", "accept, status", "slack=response,", "slack=response, slack=status", "a/b=status"},
	"RESPONSE_TIMEOUT":                        {"9s, a b=1s", "0", "1h"},
	"SUBSCRIBE_ALLOWED_IPS":                   {"10.0.0.0/33"},
	"WEBHOOKS_ALLOWED_IPS":                    {"relay.example.com"},
	"TRUSTED_PROXIES":                         {"::ffff:0.0.0.0/1", "10.0.0.1-10.0.0.9", "fe80::1%eth0"},
	"REDIS_URL":                               {"http://user:hunter2@redis", "redis:6379", "redis://redis/first"},
	"REDIS_RECONNECT_BACKOFF_FACTOR":          {"0"},
	"REDIS_RECONNECT_BACKOFF_INITIAL_TIMEOUT": {"0"},
	"REDIS_RECONNECT_BACKOFF_MAX_TIMEOUT":     {"soon"},
	"REDIS_RECONNECT_BACKOFF_RANDOMIZE":       {"2"},
	"REDIS_MAX_RECONNECT_ATTEMPTS":            {"-2"},
	"SOURCE_URL": {
		"wss://user:hunter2@relay/subscribe/m?token=hunter2", "relay.example.com/subscribe/m", "http://", "http://relay", "http://relay/", "http://relay/m", "http://:80/",
		"http://relay/subscribe", "http://relay/subscribe/", "http://relay/subscribe/m/x", "http://relay/subscribe/m//", "http://relay/subscribe/a%20b", "http://relay/subscribe/..",
		"http://relay/webhooks/m", "http://relay/webhooks/m/", "http://relay/xsubscribe/m", "http://relay/?/subscribe/m", "http://relay/#x", "http://relay/%zz",
		"http://relay:65536/subscribe/m", "http://relay/subscribe/m,,x", "http://hunter2@relay/subscribe/m, http://other/subscribe/m/",
	},
	"TARGET_BASE_URL": {
		"http://hunter2@target/#x", "http://target/a/../b", "http://target//a", "http://target?", "http://hunter2@target:70000", "http://target, http://hunter2@target",
		"http://target, other=http://hunter2@target",
	},
	"TARGET_STRIP_PREFIX":         {"maybe", "false, other=true"},
	"TARGET_RETRY_STATUSES":       {"500, 666", "399", "599"},
	"RECONNECT_INTERVAL":          {"0"},
	"TARGET_TIMEOUT":              {"30 s"},
	"TARGET_RETRY_WINDOW":         {"1y"},
	"TARGET_CONCURRENCY":          {"0"},
	"CA_FILE":                     {"/nonexistent"},
	"TARGET_INSECURE_SKIP_VERIFY": {"sometimes"},
	"HTTP_PROXY":                  {"::proxy", "http://pro xy"},
	"HTTPS_PROXY":                 {"socks9://proxy"},
}

// complaint is what run says to env, which must be a mistake of configuration.
func complaint(t testing.TB, env ...string) string {
	t.Helper()
	var log logBuffer
	ctx, cancel := context.WithTimeout(t.Context(), patience) // what is no mistake runs
	defer cancel()
	err := run(ctx, env, &log)
	e, ok := errors.AsType[configError](err)
	if !ok {
		t.Fatalf("%q: error %v, want one of configuration; log:\n%s", env, err, &log)
	}
	return e.Error()
}

// TestMistakes: exactly the variable that is wrong is named; of many at once, each
// on a line of its own; and no secret in any.
func TestMistakes(t *testing.T) {
	t.Parallel()
	server, client := []string{"RELAY_MODE=server"}, []string{"RELAY_MODE=client", "SOURCE_URL=http://relay/subscribe/m", "TARGET_BASE_URL=http://target"}
	check := func(name string, env []string, more ...string) {
		t.Helper()
		if text := complaint(t, slices.Concat(env, more)...); !strings.HasPrefix(text, name) || strings.Contains(text, "\n") || strings.Contains(text, "hunter2") {
			t.Errorf("%q: %q, want one line about %s", more, text, name)
		}
	}
	for role, env := range map[string][]string{"server": server, "client": client} {
		var all, want, got []string
		for _, s := range settings(&Config{}) {
			values, ok := mistaken[s.name]
			if !ok {
				t.Errorf("is there no mistake in %s?", s.name)
			}
			for i, value := range values {
				if i == 0 {
					all = append(all, s.name+"="+value)
				}
				if s.role == "both" || s.role == role {
					check(s.name, env, s.name+"="+value)
					want = append(want, s.name)
				}
			}
		}
		text := complaint(t, append(env, all...)...)
		for line := range strings.SplitSeq(text, "\n") {
			name, rest, _ := strings.Cut(line, ": ")
			got = append(got, name)
			if !regexp.MustCompile("must |range |channel is |no such file").MatchString(rest) {
				t.Errorf("%s: unexpected line %q", role, line)
			}
		}
		if want = slices.Compact(want); !slices.Equal(got, want) || strings.Contains(text, "hunter2") {
			t.Errorf("%s: complaints about\n%q, want\n%q, and no secret in\n%s", role, got, want, text)
		}
	}
	text := complaint(t, "RELAY_MODE=both", "SERVER_PORT=abc", "RECONNECT_INTERVAL=abc", "SERVER_TLS_CERT_FILE=/nonexistent", "SERVER_TLS_KEY_FILE=/nonexistent")
	for _, name := range []string{"RELAY_MODE", "SERVER_PORT", "RECONNECT_INTERVAL"} { // of any role when there is none
		if !strings.Contains(text, name) {
			t.Errorf("%s is not in %q", name, text)
		}
	}
	check("RELAY_MODE", nil)
	check("RELAY_MODE", nil, "RELAY_MODE=")
	check("RELAY_MODE", nil, "RELAY_MODE=both")
	check("SOURCE_URL", client, "SOURCE_URL=")
	check("TARGET_BASE_URL", client, "TARGET_BASE_URL=")
	check("TARGET_BASE_URL", client, "SOURCE_URL=http://relay/subscribe/m, http://relay/subscribe/n", "TARGET_BASE_URL=n=http://hunter2@target")
	check("SERVER_PORT, HEALTH_SERVICE_PORT", server, "SERVER_PORT=9000", "HEALTH_SERVICE_PORT=9000")

	nonsense, cert, key, ca := tokensFile(t, "hunter2"), tokensFile(t, ""), tokensFile(t, ""), tokensFile(t, string(newAuthority(t, nil).pem))
	writeCertificate(t, cert, key, 1)
	check("CA_FILE", client, "CA_FILE="+nonsense)
	for _, name := range []string{"AUTH_TOKENS_FILE", "WEBHOOK_SECRETS_FILE"} {
		check(name, server, name+"="+tokensFile(t, "m hunter2 hunter2\n"))
		check(name, server, name+"="+tokensFile(t, "# nothing\n"))
	}
	check("AUTH_TOKEN", server, "AUTH_TOKENS_FILE="+tokensFile(t, "ci secret\n"), "AUTH_TOKEN=")
	secure := append(server, "SERVER_TLS_CERT_FILE="+cert, "SERVER_TLS_KEY_FILE="+key)
	check("SERVER_TLS_CERT_FILE", secure, "SERVER_TLS_KEY_FILE=")
	check("SERVER_TLS_CERT_FILE", secure, "SERVER_TLS_CERT_FILE=")
	check("SERVER_TLS_CERT_FILE", secure, "SERVER_TLS_CERT_FILE=/nonexistent")
	check("SERVER_TLS_CLIENT_CA_FILE", server, "SERVER_TLS_CLIENT_CA_FILE="+ca)
	check("SERVER_TLS_CLIENT_CA_FILE", secure, "SERVER_TLS_CLIENT_CA_FILE="+nonsense)
	check("SERVER_TLS_CLIENT_CA_FILE", secure, "SERVER_TLS_CLIENT_CA_FILE="+key)
	secure = append(client, "SOURCE_URL=https://relay/subscribe/m", "SOURCE_TLS_CERT_FILE="+cert, "SOURCE_TLS_KEY_FILE="+key)
	check("SOURCE_TLS_CERT_FILE", secure, "SOURCE_TLS_KEY_FILE=")
	check("SOURCE_TLS_CERT_FILE", secure, "SOURCE_TLS_CERT_FILE=")
	check("SOURCE_TLS_CERT_FILE", secure, "SOURCE_TLS_CERT_FILE=/nonexistent")
	check("SOURCE_TLS_CERT_FILE", secure, "SOURCE_TLS_KEY_FILE="+nonsense)
	check("SOURCE_TLS_CERT_FILE", secure, "SOURCE_URL=https://relay/subscribe/m, http://relay/subscribe/n")
}

// TestValues: the forms in which values may be written.
func TestValues(t *testing.T) {
	payload := func(c *Config) any { return c.Server.MaxPayload }
	heartbeat := func(c *Config) any { return c.Server.Heartbeat }
	health := func(c *Config) any { return c.Health }
	modes := func(c *Config) any { return c.Server.Modes }
	for _, tt := range []struct {
		entry string
		get   func(*Config) any
		want  any
	}{
		{"SERVER_PORT=", func(c *Config) any { return fmt.Sprint(c.Role, c.Port) }, "server3000"},
		{"SERVER_MAX_PAYLOAD_SIZE_LIMIT=", payload, int64(3 << 20)},
		{"SERVER_MAX_PAYLOAD_SIZE_LIMIT=1", payload, int64(1)},
		{"SERVER_MAX_PAYLOAD_SIZE_LIMIT=512b", payload, int64(512)},
		{"SERVER_MAX_PAYLOAD_SIZE_LIMIT=100kb", payload, int64(100 << 10)},
		{"SERVER_MAX_PAYLOAD_SIZE_LIMIT=1.5MB", payload, int64(3 << 19)},
		{"SERVER_MAX_PAYLOAD_SIZE_LIMIT= 2 Gb ", payload, int64(2 << 30)},
		{"SERVER_HEARTBEAT_INTERVAL=", heartbeat, 5 * time.Second},
		{"SERVER_HEARTBEAT_INTERVAL=250", heartbeat, 250 * time.Millisecond},
		{"SERVER_HEARTBEAT_INTERVAL=1m30s", heartbeat, 90 * time.Second},
		{"SERVER_HEARTBEAT_INTERVAL= 1.5s ", heartbeat, 1500 * time.Millisecond},
		{"HEALTH_SERVICE_SHUTDOWN_DELAY=0", func(c *Config) any { return c.ShutdownDelay }, time.Duration(0)},
		{"RESPONSE_MODE=status", modes, byChannel[string]{Default: "status"}},
		{"RESPONSE_MODE=Accept, slack=response,ci = STATUS", modes, byChannel[string]{"accept", map[string]string{"slack": "response", "ci": "status"}}},
		{"RESPONSE_MODE=slack=response", modes, byChannel[string]{"accept", map[string]string{"slack": "response"}}},
		{"RESPONSE_TIMEOUT=slack=2500", func(c *Config) any { return c.Server.Timeouts }, byChannel[time.Duration]{9 * time.Second, map[string]time.Duration{"slack": 2500 * time.Millisecond}}},
		{"TRUSTED_PROXIES=10.0.0.9/8, ::1,192.0.2.1  ::ffff:192.0.2.2", func(c *Config) any { return fmt.Sprint(c.Server.TrustedProxies) }, "[10.0.0.0/8 ::1/128 192.0.2.1/32 192.0.2.2/32]"},
		{"SUBSCRIBE_ALLOWED_IPS=", func(c *Config) any { return c.Server.SubscribeAllowed == nil }, true},
		{"HEALTH_SERVICE_DETECT_KUBERNETES=FALSE", health, true},
		{"HEALTH_SERVICE_DETECT_KUBERNETES=1", health, false},
		{"HEALTH_SERVICE_PORT=", health, false},
		{"HEALTH_SERVICE_PORT=9000", health, true},
		{"KUBERNETES_SERVICE_HOST=10.0.0.1", health, true},
		{"REDIS_MAX_RECONNECT_ATTEMPTS=", func(c *Config) any { return c.Redis.MaxAttempts }, -1},
		{"REDIS_RECONNECT_BACKOFF_RANDOMIZE=false", func(c *Config) any { return c.Redis.Backoff }, Backoff{Initial: 100 * time.Millisecond, Max: time.Second, Factor: 2}},
	} {
		c, warnings, err := loadConfig([]string{"RELAY_MODE=Server", tt.entry}) // in any case
		if err != nil || len(warnings) > 0 {
			t.Errorf("%s: %v %v", tt.entry, err, warnings)
		} else if got := tt.get(c); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.entry, got, tt.want)
		}
	}
}

// TestHeartbeatsAreBelieved: a client derives its watchdog from what the
// server announces, so the server must not accept what clients do not believe.
func TestHeartbeatsAreBelieved(t *testing.T) {
	for _, value := range []string{"100ms", "1s", "5m", "6m", "1h"} {
		c, _, err := loadConfig([]string{"RELAY_MODE=server", "SERVER_HEARTBEAT_INTERVAL=" + value})
		_, data, _ := strings.Cut(readyFrame(c.Server.Heartbeat), "data: ")
		if got := announced([]byte(data)); err == nil && got != c.Server.Heartbeat {
			t.Errorf("an interval of %s is accepted, and clients take it for %s", value, got)
		}
	}
}

// TestEmptyMeansUnset: a variable set to nothing is as good as absent.
func TestEmptyMeansUnset(t *testing.T) {
	for _, env := range [][]string{
		{"RELAY_MODE=server"},
		{"RELAY_MODE=client", "SOURCE_URL=http://relay/subscribe/m", "TARGET_BASE_URL=http://target"},
	} {
		empty := []string{"RELAY_TYPO="}
		for _, s := range settings(&Config{}) {
			if s.name != "AUTH_TOKEN" { // it would open the server
				empty = append(empty, s.name+"=", s.name+"= \t")
			}
		}
		want := configOf(t, env...)
		got, warnings, err := loadConfig(append(empty, env...))
		if err != nil || len(warnings) != 1 || got.shown.String() != want.shown.String() || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, want %+v; warnings %v, want one; error %v", env[0], got, want, warnings, err)
		}
	}
}

// TestStartupLog: the settings in force are logged once, without secrets, and what may
// be wrong with them; the health service is not there unasked.
func TestStartupLog(t *testing.T) {
	t.Parallel()
	const open = "anybody may subscribe: neither AUTH_TOKEN nor AUTH_TOKENS_FILE is set"
	server := startServer(t, "AUTH_TOKEN=hunter2", "RESPONSE_MODE=slack=response", "RELAY_MODUS=hunter2", "REDIS_URL=redis://user:hunter2@127.0.0.1:1/0")
	server.wait("redis is down")
	client := start(t, "RELAY_MODE=client", "AUTH_TOKEN=hunter2", "SOURCE_URL=http://user:hunter2@127.0.0.1:1/subscribe/m?token=hunter2",
		"TARGET_BASE_URL=http://user:hunter2@127.0.0.1:1/base", "HTTPS_PROXY=http://user:hunter2@proxy:3128", "HTTP_PROXY=user:hunter2@proxy:3128")
	for p, want := range map[*program]map[string]any{
		server: {"RELAY_MODE": "server", "SERVER_PORT": "0", "RESPONSE_MODE": "slack=response", "REDIS_URL": "redis://redacted@127.0.0.1:1/0"},
		client: {"RELAY_MODE": "client", "SOURCE_URL": "http://redacted@127.0.0.1:1/subscribe/m", "TARGET_BASE_URL": "http://redacted@127.0.0.1:1/base",
			"HTTPS_PROXY": "http://redacted@proxy:3128", "HTTP_PROXY": "[redacted]"},
	} {
		maps.Copy(want, map[string]any{"AUTH_TOKEN": "[redacted]", "LOG_LEVEL": "debug", "LOG_FORMAT": "json"})
		records := p.log.lines("starting")
		if len(records) != 1 || records[0]["version"] != version || records[0]["role"] != want["RELAY_MODE"] || !reflect.DeepEqual(records[0]["settings"], want) {
			t.Fatalf("start-up log is %v, want settings %v", records, want)
		}
		if strings.Contains(p.log.String(), "hunter2") || len(p.log.lines("health service listening")) > 0 || len(p.log.lines(open)) > 0 {
			t.Errorf("a secret, a health service or an open door in the log:\n%s", p.log)
		}
	}
	if lines := server.log.lines("unknown variable"); len(lines) != 1 || lines[0]["variable"] != "RELAY_MODUS" || lines[0]["level"] != "WARN" {
		t.Errorf("warned about %v, want RELAY_MODUS", lines)
	}
	startServer(t).wait(open)
}

// TestMisspelled: a name that may have been meant for one of ours is warned about
// with that one, since what it should have set is not: an access list would be
// open. What Kubernetes and ordinary environments set is not ours to judge.
func TestMisspelled(t *testing.T) {
	var names, want []string
	env := []string{"RELAY_MODE=server"}
	for _, s := range settings(&Config{}) {
		names = append(names, s.name)
		if bad := mistaken[s.name]; bad != nil && s.role == "client" { // of the other role, which is not read either
			env = append(env, s.name+"="+bad[0])
			if !strings.HasSuffix(s.name, "_PROXY") {
				want = append(want, "variable is of the other role, and has no effect [variable "+s.name+" role client]")
			}
		}
	}
	for _, tt := range []struct{ typo, meant string }{ // in the order of their names
		{"AUTH_TOKEN_FILE", "AUTH_TOKENS_FILE"}, {"CA_FIL", "CA_FILE"}, {"CA_FLIE", "CA_FILE"}, {"LOG_LEVVEL", "LOG_LEVEL"}, {"NO_PROX", "NO_PROXY"}, {"REDIS_URI", "REDIS_URL"},
		{"RELAY_NAME", ""}, {"RELAY_OMDE", "RELAY_MODE"}, {"RESPONSE_MOD", "RESPONSE_MODE"}, {"SERVER_HELD_BUFFRE", "SERVER_HELD_BUFFER"}, {"SERVER_MAX_PAYLOAD_LIMIT", "SERVER_MAX_PAYLOAD_SIZE_LIMIT"}, {"SERVER_MAX_PAYLOAD_SI", ""}, {"SOURCE_UR", "SOURCE_URL"},
		{"SUBSCRIBE_ALLOWED_IP", "SUBSCRIBE_ALLOWED_IPS"}, {"TRUSTED_PROXY", "TRUSTED_PROXIES"}, {"WEBHOOKS_SECRET", ""}, {"WEBHOOK_ALLOWED_IPS", "WEBHOOKS_ALLOWED_IPS"},
	} {
		env = append(env, tt.typo+"=9000")
		if tt.meant != "" {
			tt.meant = " meant " + tt.meant
		}
		want = append(want, "unknown variable [variable "+tt.typo+tt.meant+"]")
	}
	for _, service := range []string{"SERVER", "RELAY", "REDIS", "TARGET", "SOURCE", "WEBHOOK_RELAY", "WEBHOOKS", "RESPONSE_MODE", "HEALTH_SERVICE", "AUTH_TOKEN", "SERVER_PRT"} {
		port := service + "_PORT_3000_TCP"
		env = append(env, service+"_SERVICE_HOST=10.0.0.1", service+"_SERVICE_PORT=3000", service+"_SERVICE_PORT_WEB=3000",
			port+"=tcp://10.0.0.1:3000", port+"_PROTO=tcp", port+"_PORT=3000", port+"_ADDR=10.0.0.1", service+"_PORT_53_UDP_ADDR=10.0.0.1")
		if !slices.Contains(names, service+"_PORT") { // that of a Service called server is a mistake
			env = append(env, service+"_PORT=tcp://10.0.0.1:3000")
		}
	}
	for name := range strings.FieldsSeq("PATH HOME HOSTNAME LANG LC_ALL TERM PWD OLDPWD SHLVL SHELL USER LOGNAME TZ TMPDIR MAIL EDITOR DISPLAY PORT HOST DEBUG NODE_ENV " +
		"GOPATH GOPROXY GOROOT GOMAXPROCS GOMEMLIMIT GODEBUG GOGC http_proxy https_proxy no_proxy ALL_PROXY all_proxy FTP_PROXY SSL_CERT_FILE SSL_CERT_DIR " +
		"NO_COLOR CI POD_NAME POD_IP NODE_NAME NAMESPACE KUBERNETES_SERVICE_HOST KUBERNETES_PORT INVOCATION_ID JOURNAL_STREAM LISTEN_FDS NOTIFY_SOCKET " +
		"SSH_CONNECTION XDG_RUNTIME_DIR DBUS_SESSION_BUS_ADDRESS container VERSION LOG_FILE AWS_REGION JAVA_HOME PYTHONPATH HTTP_PROXY HTTPS_PROXY NO_PROXY _") {
		env = append(env, name+"=x")
	}
	_, warnings, err := loadConfig(env)
	var got []string
	for _, w := range warnings {
		got = append(got, fmt.Sprint(w.message, " ", w.attrs))
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("warnings\n%q, want\n%q; %v", got, want, err)
	}
}

// Health.

// channelLabel is the label that every metric of a client has.
var channelLabel = regexp.MustCompile(`channel="[^"]*",?`)

// checkProbes wants the statuses of /live, /ready and /health.
func checkProbes(t testing.TB, p *program, when string, want ...int) {
	t.Helper()
	if got := []int{probeStatus(t, p, "/live"), probeStatus(t, p, "/ready"), probeStatus(t, p, "/health")}; !slices.Equal(got, want) {
		t.Errorf("%s: /live, /ready and /health are %d, want %d", when, got, want)
	}
}

// checkMetrics wants these values, by name.
func checkMetrics(t testing.TB, p *program, want map[string]float64) {
	t.Helper()
	got := scrape(t, p)
	maps.DeleteFunc(got, func(name string, _ float64) bool { _, ok := want[name]; return !ok })
	if !maps.Equal(got, want) {
		t.Errorf("metrics are %v, want %v", got, want)
	}
}

// TestServerHealth: a draining server is not ready any more, but live and at
// work until load balancers have noticed.
func TestServerHealth(t *testing.T) {
	t.Parallel()
	server := startServer(t, "HEALTH_SERVICE_PORT=0", "HEALTH_SERVICE_SHUTDOWN_DELAY=4s")
	checkProbes(t, server, "at work", 200, 200, 200)
	before := scrape(t, server)
	stream := openFeed(t, server, "m")
	for _, channel := range []string{"m0", "m1", "m2", "m"} {
		postAccepted(t, server, channel, "x?label=x")
	}
	stream.only(t, "x")
	wire(t, server.addr, compose("POST /webhooks/a%20b HTTP/1.1", ""))
	if after := scrape(t, server); !slices.Equal(slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after))) {
		t.Errorf("metrics changed their names from %v to %v", before, after)
	}
	checkMetrics(t, server, map[string]float64{
		`relay_webhooks_total{outcome="accepted",reason=""}`: 1, `relay_webhooks_total{outcome="lost",reason="unknown_channel"}`: 0,
		`relay_webhooks_total{outcome="refused",reason="channel"}`: 1, `relay_webhooks_total{outcome="refused",reason="path"}`: 0, "relay_webhook_taken_seconds_count": 1,
		"relay_events_delivered_total": 1, "relay_subscribers": 1, "relay_channels": 1, "relay_held_webhooks": 3, // which may yet be heard
	})
	server.cancel()
	eventually(t, "unready", func() bool { return probeStatus(t, server, "/ready") == 503 })
	checkProbes(t, server, "draining", 200, 503, 503)
	if answer := exchange(t, server.addr, compose("POST /webhooks/m/late HTTP/1.1", "")); !strings.HasPrefix(answer, "HTTP/1.1 200 OK\r\nConnection: close\r\n") {
		t.Errorf("answer to a webhook while draining: %q, want 200 and the end of the connection", answer)
	}
	stream.only(t, "late")
	if err := server.stop(); err != nil {
		t.Errorf("run returned %v", err)
	}
	stream.endedAt(t)
}

// TestClientHealth: ready means an open stream; a source that is away makes a
// client unready and never dead. A client that is told to end takes nothing new
// and brings what it has to its end, for which it stays live.
func TestClientHealth(t *testing.T) {
	t.Parallel()
	end, left, answer := make(chan struct{}), make(chan struct{}), make(chan string, 1)
	var up atomic.Bool
	var ready atomic.Int64
	source := newSource(t, func(_ int, w http.ResponseWriter, r *http.Request) {
		if !up.Load() {
			w.WriteHeader(503)
			return
		}
		if ready.Add(1) == 1 {
			event := httpBlock("same", "POST /webhooks/m/x HTTP/1.1\n", "")
			tell(w, readyBlock, event, event, "data: {\n\n")
			<-end
			return
		}
		tell(w, readyBlock, httpBlock("last", "POST /webhooks/m/x HTTP/1.1\n", ""))
		<-r.Context().Done()
		close(left)
	})
	target := newTarget(t, func(recorded) string { return <-answer })
	client := start(t, "RELAY_MODE=client", "SOURCE_URL="+source.URL+"/subscribe/m", "TARGET_BASE_URL="+target.url, "RECONNECT_INTERVAL=1", probed[0])
	client.wait("no stream from the source")
	checkProbes(t, client, "before ready", 200, 503, 503)
	up.Store(true)
	client.wait("stream ready")
	checkProbes(t, client, "ready", 200, 200, 200)
	target.next(t)
	answer <- ok200
	client.wait("webhook forwarded")
	client.wait("event refused")
	checkMetrics(t, client, map[string]float64{
		"relay_events_total": 3, "relay_events_duplicate_total": 1, "relay_events_invalid_total": 1,
		`relay_forwards_total{code="2xx"}`: 1, `relay_forwards_total{code="timeout"}`: 0, "relay_stream_ends_total": 0,
	})
	up.Store(false)
	close(end)
	client.wait("stream ended")
	checkProbes(t, client, "after the stream", 200, 503, 503)
	up.Store(true)
	target.next(t)
	awaitReady(t, client)
	client.cancel()
	<-left
	eventually(t, "unready", func() bool { return probeStatus(t, client, "/ready") == 503 })
	checkProbes(t, client, "finishing", 200, 503, 503)
	if answer <- ok200; client.stop() != nil || len(client.log.lines("webhook forwarded")) != 2 {
		t.Errorf("run returned %v, want two webhooks forwarded", client.err)
	}
}

// TestNothingLeaks sends a secret through every field of every message, to
// both roles, with targets and sources that fail in every way, and looks for
// it in the logs at debug level and in every answer of the relay itself.
func TestNothingLeaks(t *testing.T) {
	t.Parallel()
	secret := func(where string) string { return "canary-" + where + "-canary" }
	credentials := func(where string) string { return secret(where+"-user") + ":" + secret(where+"-password") }
	const secretNumber = "6561737465726567.5"
	var said []string // what somebody outside could read
	note := func(where string, texts ...any) { said = append(said, where+": "+fmt.Sprint(texts...)) }

	failures := map[string]string{
		"status":   "HTTP/1.1 500 " + secret("reason") + "\r\nX: " + secret("reply-header") + "\r\nContent-Length: 2\r\n\r\n{}",
		"broken":   hangUp,
		"garbage":  secret("reply-line") + "\r\n\r\n",
		"header":   "HTTP/1.1 200 OK\r\n" + secret("reply-field") + "\r\n\r\n",
		"length":   "HTTP/1.1 200 OK\r\nContent-Length: " + secret("reply-length") + "\r\n\r\n",
		"chunk":    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + secret("reply-chunk") + "\r\n",
		"redirect": "HTTP/1.1 307 Redirect\r\nLocation: http://user:" + secret("location") + "@x\x7f/\r\nContent-Length: 0\r\n\r\n",
		"upgrade":  "HTTP/1.1 101 " + secret("reply-upgrade") + "\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
	}
	target := newTarget(t, func(r recorded) string {
		_, failure, _ := strings.Cut(strings.Fields(r.line)[1], "?fail=")
		failure, _, _ = strings.Cut(failure, "&")
		return failures[failure]
	})
	server := startServer(t, "AUTH_TOKEN="+secret("token"), "RESPONSE_MODE=held=status", "RESPONSE_TIMEOUT=300", "SERVER_MAX_PAYLOAD_SIZE_LIMIT=1kb", probed[0], probed[1])
	startFrom := func(source string) *program {
		return start(t, "RELAY_MODE=client", "SOURCE_URL=http://"+credentials("source")+"@"+source+"/subscribe/held?k="+secret("source-query"), "AUTH_TOKEN="+secret("token"),
			"TARGET_BASE_URL=http://"+credentials("target")+"@"+hostOf(target.url), "TARGET_RETRY_WINDOW=0", "TARGET_TIMEOUT=100", "RECONNECT_INTERVAL=1", "HEALTH_SERVICE_PORT=0")
	}
	client := startFrom(server.addr)
	client.wait("stream ready")
	headers := []string{
		"X-Secret: " + secret("header"), "Authorization: Bearer " + secret("authorization"), "Cookie: " + secret("cookie"),
		"Referer: http://" + secret("referer") + "/", "User-Agent: " + secret("user-agent"), "X-Auth-Token: " + secret("wrong-token"),
		"X-Forwarded-For: " + secret("forwarded"), "X-Relay-Client: " + secret("client-name") + "!", "Connection: close",
	}
	for failure := range failures {
		line := "POST /webhooks/held/" + secret("path") + "?fail=" + failure + "&q=" + secret("query") + " HTTP/1.1"
		for reached := false; !reached; { // on a busy machine the sender's time may be over before
			status, answer, header := wire(t, server.addr, compose(line, secret("body"), headers...))
			if failure != "status" && status != 502 && status != 504 && status/100 != 2 && status/100 != 3 {
				t.Errorf("%s: status %d", failure, status)
			}
			note(failure, header, answer)
			for len(target.got) > 0 {
				reached = strings.Contains((<-target.got).line, "?fail="+failure+"&") || reached
			}
		}
	}

	// Every answer that refuses.
	const toReports, report = "POST /subscribe/held/responses HTTP/1.1", "HTTP/1.1 200 OK\r\nX-Relay-Event-Id: " + testID + "\r\n"
	requests := []string{
		compose("GET /subscribe/held/?q="+secret("query")+" HTTP/1.1", "", headers...),
		compose(toReports, secret("report"), headers...),
		compose("POST /webhooks/m/../"+secret("path")+" HTTP/1.1", secret("body"), headers...),
		compose("POST /"+secret("path")+"?"+secret("query")+" HTTP/1.1", secret("body"), headers...),
		compose("POST /webhooks/m HTTP/1.1", secret("chunk")+"\r\n", "Transfer-Encoding: chunked", "Connection: close"),
		compose("POST /webhooks/m HTTP/1.1", "", "Content-Length: "+secret("length")),
		compose("POST /webhooks/m HTTP/1.1", "", secret("field")+" : x"),
		compose("POST /webhooks/m HTTP/1.1", "", "Host: "+secret("host")),
		secret("line") + "\r\n\r\n",
	}
	for _, body := range []string{
		secret("report"), "HTTP/1.1 " + secret("report-status") + " OK\r\n\r\n", "HTTP/1.1 600 " + secret("report-reason") + "\r\n\r\n",
		report + secret("report-field") + "\r\n\r\n", report + "X: " + secret("report-value") + "\x00\r\nContent-Length: 0\r\n\r\n",
		report + "X-Relay-Error: " + secret("report-error") + "\r\nContent-Length: 0\r\n\r\n", report + "Content-Length: " + secret("report-length") + "\r\n\r\n",
		report + "Transfer-Encoding: " + secret("report-encoding") + "\r\n\r\n", report + "Transfer-Encoding: chunked\r\n\r\n" + secret("report-chunk") + "\r\n",
		report + "Content-Length: 99\r\n\r\n" + secret("report-body"), strings.Replace(report, testID, secret("report-id"), 1) + "Content-Length: 0\r\n\r\n",
	} {
		requests = append(requests, compose(toReports, body, "Authorization: Bearer "+secret("token")))
	}
	for _, request := range requests {
		status, answer, header := wire(t, server.addr, request)
		if status < 400 {
			t.Errorf("%.60q: status %d, want a refusal", request, status)
		}
		note("refusal", header, answer)
	}
	for _, page := range []string{"/health", "/ready", "/metrics", "/status", "/" + secret("query")} {
		for _, p := range []*program{server, client} {
			_, answer, header := send(t, "GET", "http://"+p.health+page, "")
			note("page", header, answer)
		}
	}

	// Sources that fail.
	const held = "POST /webhooks/held/x HTTP/1.1\n"
	blocks := []string{
		"data: " + secret("event") + "\n\n", "data: {\"body\":\"" + secret("event-body") + "\n\n", "event: " + secret("event-name") + "\ndata: {}\n\n",
		"data: {\"originalUrl\":\"/webhooks/held/x\",\"timestamp\":" + secretNumber + "}\n\n", httpBlock(secret("event-id")+" ", held, ""),
		dataBlock(map[string]any{"originalUrl": "/webhooks/held/x", "headers": map[string]any{secret("event-key"): secret("event-value") + "\r\n"}}),
		dataBlock(map[string]any{"originalUrl": "/webhooks/held/x? " + secret("event-query"), "body": secret("event-body")}),
		httpBlock("1", "POST /webhooks/held/../"+secret("event-path")+" HTTP/1.1\n", secret("event-body")), httpBlock("2", held+secret("event-field")+"\n", ""),
		httpBlock("3", held+"X-Relay-Body: base64\n", secret("event-base64")+"*"), httpBlock("4", held+"Content-Length: "+secret("event-length")+"\n", ""),
		dataBlock(map[string]any{"originalUrl": "/webhooks/held/last?fail=broken"}),
	}
	refusing := newSource(t, func(n int, w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "http://user:"+secret("source-location")+"@x/")
		w.Header().Set("X", secret("source-header"))
		w.Header().Set("Content-Type", secret("source-type"))
		w.WriteHeader([]int{200, 302, 401, 503}[n%4])
		io.WriteString(w, secret("source-body"))
	})
	garbage := newTarget(t, func(recorded) string { return "HTTP/1.1 200 OK\r\n" + secret("source-field") + "\r\n\r\n" })
	programs := []*program{client, server}
	for _, tt := range []struct {
		source, message string
		lines           int
	}{{steady(t, blocks...).URL, "webhook given up", 1}, {refusing.URL, "no stream from the source", 4}, {garbage.url, "no stream from the source", 1}} {
		p := startFrom(hostOf(tt.source))
		eventually(t, tt.message, func() bool { return len(p.log.lines(tt.message)) >= tt.lines })
		if n := len(p.log.lines("event refused")); tt.message == "webhook given up" && n != len(blocks)-2 { // but for the last and the one of another name
			t.Errorf("%d events refused, want %d", n, len(blocks)-2)
		}
		programs = append(programs, p)
	}
	for _, p := range programs {
		p.stop()
		note("log", p.log)
	}
	all := strings.Join(said, "\n")
	all = strings.ReplaceAll(all, secret("path"), "path") // of webhooks, which the log and the status page name
	leaks := []string{`canary-.*?-canary`, regexp.QuoteMeta(secretNumber)}
	for _, where := range []string{"source", "target"} {
		leaks = append(leaks, regexp.QuoteMeta(base64.StdEncoding.EncodeToString([]byte(credentials(where)))))
	}
	for _, m := range regexp.MustCompile(strings.Join(leaks, "|")).FindAllStringIndex(all, 10) {
		t.Errorf("a secret leaks in …%q…", all[max(0, m[0]-200):min(len(all), m[1]+60)])
	}
}

// The program as a process.

// launchTo is launch with a file for the log.
func launchTo(t testing.TB, log *os.File, env []string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.CommandContext(t.Context(), os.Args[0], args...), exited: make(chan struct{})}
	p.cmd.Env = append([]string{"RELAY_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0", "SERVER_PORT=0", "LOG_FORMAT=json", "LOG_LEVEL=debug"}, env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.stderr
	if log != nil {
		p.cmd.Stderr = log
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.exited)
		p.cmd.Wait()
	}()
	t.Cleanup(func() { <-p.exited })
	return p
}

// TestLogReaderGoes: the program outlives who reads its log, and ends in order.
func TestLogReaderGoes(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p := launchTo(t, w, []string{"RELAY_MODE=server"})
	w.Close()
	var record struct{ Msg, Addr string }
	for lines := json.NewDecoder(r); record.Msg != "listening"; {
		if err := lines.Decode(&record); err != nil {
			t.Fatal(err)
		}
	}
	r.Close()
	_, port, _ := net.SplitHostPort(record.Addr)
	for range 3 {
		postAccepted(t, &program{addr: "127.0.0.1:" + port}, "ci", "x")
	}
	if code := p.code(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestExitCodes: 0 in order, 1 for what failed at run time, 2 for a mistake in how
// it was started, and the reason is the last record of the log, in its format; the
// second signal does not wait.
func TestExitCodes(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, taken, _ := net.SplitHostPort(l.Addr().String())
	client := []string{"RELAY_MODE=client", "SOURCE_URL=http://127.0.0.1:1/subscribe/m", "TARGET_BASE_URL=http://127.0.0.1:1"}
	const mistakes = "the configuration has mistakes"
	inUse := ": listen tcp :" + taken + ": bind: address already in use"
	for _, test := range []struct {
		name string
		env  []string
		code int
		said string
	}{
		{"no environment", nil, 2, mistakes},
		{"two mistakes", []string{"RELAY_MODE=server", "SERVER_PORT=x", "LOG_LEVEL=x"}, 2, mistakes},
		{"no such file", []string{"RELAY_MODE=server", "AUTH_TOKENS_FILE=/nonexistent"}, 2, mistakes},
		{"no such format", []string{"RELAY_MODE=server", "LOG_FORMAT=xml"}, 2, mistakes},
		{"port in use", []string{"RELAY_MODE=server", "SERVER_PORT=" + taken}, 1, "listen for webhooks (SERVER_PORT)" + inUse},
		{"port of probes in use", []string{"RELAY_MODE=server", "HEALTH_SERVICE_PORT=" + taken}, 1, "listen for probes (HEALTH_SERVICE_PORT)" + inUse},
		{"port of a client's probes in use", append(client, "HEALTH_SERVICE_PORT="+taken), 1, "listen for probes (HEALTH_SERVICE_PORT)" + inUse},
		{"no Redis", []string{"RELAY_MODE=server", "REDIS_URL=redis://127.0.0.1:1", "REDIS_MAX_RECONNECT_ATTEMPTS=1"}, 1, "redis"},
	} {
		for format, form := range map[string][2]string{
			"json": {`{"time":.*`, `"level":"ERROR","msg":"(failed"|not started: )`},
			"text": {`time=.*`, `level=ERROR msg=(failed |"not started: )`},
		} {
			p := launch(t, append([]string{"LOG_FORMAT=" + format}, test.env...))
			if code := p.code(t); code != test.code || p.out.String() != "" {
				t.Errorf("%s: exit code %d, want %d; output %.80q", test.name, code, test.code, p.out.String())
			}
			if slices.Contains(test.env, "LOG_FORMAT=xml") && format == "text" {
				continue // JSON as ever where there is no terminal
			}
			said := regexp.MustCompile("^(" + form[0] + "\n)*" + form[0] + form[1] + ".*" + regexp.QuoteMeta(test.said) + ".*\n$")
			if !said.MatchString(p.stderr.String()) {
				t.Errorf("%s: said\n%s, want lines like\n%s", test.name, &p.stderr, said)
			}
		}
	}
	for _, test := range []struct {
		argument  string
		code      int
		out, said string // their beginnings
	}{
		{"-version", 0, "webhook-relay " + version + "\n", ""},
		{"-help", 0, "webhook-relay " + version, ""},
		{"-verbose", 2, "webhook-relay " + version, "flag provided but not defined: -verbose"},
		{"server", 2, "", `webhook-relay: unexpected argument "server"`},
	} {
		p := launch(t, []string{"RELAY_MODE=server"}, test.argument)
		code, out, said := p.code(t), p.out.String(), p.stderr.String()
		if code != test.code || !strings.HasPrefix(out, test.out) || !strings.HasPrefix(said, test.said) || (test.out == "") != (out == "") || (test.said == "") != (said == "") {
			t.Errorf("%s: exit code %d, want %d; output %.80q, want %q; said %q, want %q", test.argument, code, test.code, out, test.out, said, test.said)
		}
		for _, s := range settings(&Config{}) {
			if n := strings.Count(out, "\n"+s.name+" "); test.argument == "-help" && n != 1 {
				t.Errorf("%s is in the help %d times", s.name, n)
			}
		}
	}

	for _, signal := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		server, client := launch(t, []string{"RELAY_MODE=server"}), launch(t, client)
		server.logged(t, "listening")
		client.logged(t, "no stream from the source")
		for _, p := range []*process{server, client} {
			if code := p.code(t, signal); code != 0 {
				t.Errorf("after %v: exit code %d, want 0:\n%s", signal, code, &p.stderr)
			}
		}
	}
	p := launch(t, []string{"RELAY_MODE=server", "HEALTH_SERVICE_PORT=0", "HEALTH_SERVICE_SHUTDOWN_DELAY=1h"})
	p.logged(t, "listening")
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.logged(t, "shutting down")
	eventually(t, "end at the second signal", func() bool { // which may come before the program listens for it
		p.cmd.Process.Signal(syscall.SIGTERM)
		return isClosed(p.exited)
	})
	if code := p.code(t); code != 1 {
		t.Errorf("second signal: exit code %d, want 1", code)
	}
}

// TestProbeFlag: -probe exits with 0 when the health service on this machine says
// 200; otherwise with 1, and says why in one line.
func TestProbeFlag(t *testing.T) {
	t.Parallel()
	portOf := func(addr string) string { return "HEALTH_SERVICE_PORT=" + addr[strings.LastIndexByte(addr, ':')+1:] }
	answers := func(status int) string {
		return portOf(newSource(t, func(_ int, w http.ResponseWriter, _ *http.Request) { http.Error(w, "draining\x1b", status) }).URL)
	}
	silent := loopback(t)
	t.Cleanup(func() { silent.Close() })
	server := portOf(startServer(t, "HEALTH_SERVICE_PORT=0").health)
	for _, test := range []struct {
		env, path string
		code      int
		stderr    string
	}{
		{server, "live", 0, ""},
		{server, "ready", 0, ""},
		{server, "health", 0, ""},
		{server, "metrics", 2, `invalid value "metrics" for flag -probe: must be live or ready or health`},
		{server, "", 2, `invalid value "" for flag -probe: must be `},
		{answers(503), "ready", 1, `webhook-relay: probe /ready: 503 Service Unavailable: "draining\x1b"`},
		{answers(302), "live", 1, `webhook-relay: probe /live: 302 Found: "draining\x1b"`},
		{portOf(nobody), "ready", 1, "webhook-relay: probe /ready: dial tcp 127.0.0.1:"},
		{portOf(silent.Addr().String()), "ready", 1, "webhook-relay: probe /ready: context deadline exceeded\n"},
		{"HEALTH_SERVICE_PORT=x", "ready", 1, `webhook-relay: probe /ready: HEALTH_SERVICE_PORT: "x": must be `},
	} {
		t.Run(test.path+" "+test.env, func(t *testing.T) {
			t.Parallel()
			p := launch(t, []string{test.env, "HTTP_PROXY=http://127.0.0.1:1"}, "-probe", test.path)
			code, said := p.code(t), p.stderr.String()
			if code != test.code || !strings.HasPrefix(said, test.stderr) || strings.Count(said, "\n") != min(1, test.code) {
				t.Errorf("exit code %d, want %d; stderr %q, want %q", code, test.code, said, test.stderr)
			}
		})
	}
}

// TestStderrIsTheLogAlone: nothing but records of the log is written, not even
// by net/http, which would quote what a target sends unasked.
func TestStderrIsTheLogAlone(t *testing.T) {
	t.Parallel()
	target := newTarget(t, func(recorded) string { return ok200 + "canary" })
	server := startServer(t)
	p := launch(t, []string{"RELAY_MODE=client", "SOURCE_URL=http://" + server.addr + "/subscribe/m", "TARGET_BASE_URL=" + target.url})
	for i := range 2 {
		postAccepted(t, server, "m", "x")
		eventually(t, "a forward", func() bool { return len(p.stderr.lines("webhook forwarded")) == i+1 })
	}
	if code := p.code(t, syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for line := range strings.Lines(p.stderr.String()) {
		if !json.Valid([]byte(line)) || strings.Contains(line, "canary") {
			t.Errorf("stderr has the line %q", line)
		}
	}
}

// TestEnvironmentProxy: HTTP_PROXY stands between the client and both source
// and target, except for what NO_PROXY names. net/http reads them once, from
// the environment of the process. It never asks a proxy for localhost, but does
// for 0.0.0.0, which is this host, too.
func TestEnvironmentProxy(t *testing.T) {
	t.Parallel()
	asked := make(chan string, 100)
	answers := func(who string) string {
		return newSource(t, func(_ int, w http.ResponseWriter, r *http.Request) {
			asked <- r.Method + " " + who + " " + r.RequestURI
			if r.Method == "GET" {
				channel := filepath.Base(r.URL.Path)
				tell(w, readyBlock, httpBlock("1", "POST /webhooks/"+channel+"/x?y=%zz HTTP/1.1\nX-Relay-Respond: status; timeout=60000\n", ""))
				<-r.Context().Done()
			}
		}).URL
	}
	proxy, itself := answers("proxy"), "0.0.0.0:"+regexp.MustCompile(`\d+$`).FindString(answers("itself"))
	for noProxy, forwards := range map[string]string{"other.example": "POST proxy http://" + itself, "other.example, 0.0.0.0": "POST itself "} {
		p := launch(t, []string{
			"RELAY_MODE=client", "SOURCE_URL=http://source.example/subscribe/m/, http://source.example/subscribe/n/",
			"TARGET_BASE_URL=http://target.example, n=http://" + itself, "HTTP_PROXY=" + proxy, "NO_PROXY=" + noProxy,
		})
		want := []string{
			"GET proxy http://source.example/subscribe/m/", "GET proxy http://source.example/subscribe/n/",
			forwards + "/webhooks/n/x?y=%zz", "POST proxy http://target.example/webhooks/m/x?y=%zz",
			"POST proxy http://source.example/subscribe/m/responses", "POST proxy http://source.example/subscribe/n/responses",
		}
		var got []string
		eventually(t, "all requests", func() bool {
			for len(asked) > 0 {
				got = append(got, <-asked)
			}
			return len(got) >= len(want)
		})
		p.code(t, syscall.SIGTERM)
		slices.Sort(got)
		if slices.Sort(want); !slices.Equal(got, want) {
			t.Errorf("but for %s, requests are\n%q, want\n%q", noProxy, got, want)
		}
	}
}

// What net/http does for us.

// TestHTTPLog: a panic is a bug of ours and an error, and so is running out of
// file descriptors; whatever else net/http has to say is the doing of strangers.
func TestHTTPLog(t *testing.T) {
	said := &logBuffer{}
	web := webServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("bug") }), newLogger(&Config{LogLevel: slog.LevelDebug}, said))
	l := loopback(t)
	serveOn(t, web, l)
	exchange(t, l.Addr().String(), compose("GET / HTTP/1.1", ""))
	web.ErrorLog.Print("http: TLS handshake error from 192.0.2.1:4711: EOF")
	web.ErrorLog.Print("http: Accept error: accept tcp [::]:3000: accept4: too many open files; retrying in 1s")
	var got strings.Builder
	for _, record := range said.lines("net/http") {
		fmt.Fprintf(&got, "%s %.40s\n", record["level"], record["err"])
	}
	if !regexp.MustCompile(`^ERROR http: panic serving .*\nDEBUG http: TLS handshake error .*\nERROR http: Accept error: .*\n$`).MatchString(got.String()) {
		t.Errorf("net/http has said\n%s", &got)
	}
}

// TestHush: each message has so many lines in a second, over all loggers of one
// log and however many goroutines write; the next line tells how many were
// left out. Debug lines are all there.
func TestHush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		said := &logBuffer{}
		log := newLogger(&Config{LogLevel: slog.LevelDebug}, said)
		for second := range 3 {
			var wg sync.WaitGroup
			for range hushLines {
				wg.Go(func() { log.Debug("detail") })
				for _, l := range []*slog.Logger{log, log.With("channel", "a"), log.WithGroup("g")} {
					wg.Go(func() { l.Info("flood") })
				}
			}
			wg.Wait()
			log.Info("other")
			for message, n := range map[string]int{"flood": hushLines, "detail": hushLines, "other": 1} {
				var told []any // by the first line that was counted, which need not be the first that was written
				records := said.lines(message)[second*n:]
				for _, r := range records {
					group, _ := r["g"].(map[string]any)
					if omitted := cmp.Or(r["omitted"], group["omitted"]); omitted != nil {
						told = append(told, omitted)
					}
				}
				var want []any
				if message == "flood" && second > 0 {
					want = []any{float64(2 * hushLines)}
				}
				if len(records) != n || !slices.Equal(told, want) {
					t.Errorf("second %d has %d lines of %q, want %d, which tell of %v, want %v", second, len(records), message, n, told, want)
				}
			}
			time.Sleep(time.Second)
		}
		time.Sleep(time.Hour)
		if log.Info("other"); len(said.lines("other")) != 4 {
			t.Error("silent after an hour")
		}
	})
}

// valve is a writer that takes nothing until it is opened.
type valve struct {
	logBuffer
	opened chan struct{} // closed then
}

func (v *valve) Write(p []byte) (int, error) {
	<-v.opened
	return v.logBuffer.Write(p)
}

// TestLogNobodyTakes: neither those who log nor the end wait for ever. Once the log
// is taken again, it has what found a place, and the next line tells of the rest.
func TestLogNobodyTakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		said := &valve{opened: make(chan struct{})}
		out := newLogQueue(said)
		log := newLogger(&Config{}, out)
		const seconds = logQueueLimit/hushLines + 3
		begin := time.Now()
		for range seconds {
			for range hushLines {
				log.Info("flood")
				log.Debug("detail")
			}
			time.Sleep(time.Second)
		}
		if took := time.Since(begin); took != seconds*time.Second {
			t.Errorf("logging took %v", took)
		}
		close(said.opened)
		synctest.Wait()
		log.Info("flood")
		synctest.Wait()
		lines := said.lines("flood")
		n := len(lines) - 1
		if n < logQueueLimit || n > logQueueLimit+1 || lines[n]["omitted"] != float64(seconds*hushLines-n) {
			t.Errorf("%d of %d lines are there, and the last is %v", n, seconds*hushLines, lines[n])
		}
		log.Info("last")
		if out.close(); len(said.lines("last")) != 1 {
			t.Error("the last line is not there")
		}

		never := &valve{opened: make(chan struct{})}
		defer close(never.opened)
		begin = time.Now()
		err := run(t.Context(), nil, never)
		if _, ok := errors.AsType[configError](err); !ok || time.Since(begin) != logQueueTime {
			t.Errorf("run ended after %v: %v", time.Since(begin), err)
		}
	})
}

// doorway is a listener whose connections stand in line; nobody waits.
type doorway struct {
	net.Listener
	line []net.Conn
}

var errNobodyThere = errors.New("nobody at the door")

func (d *doorway) Accept() (net.Conn, error) {
	if len(d.line) == 0 {
		return nil, errNobodyThere
	}
	conn := d.line[0]
	d.line = d.line[1:]
	return conn, nil
}

// visitor is a connection from somewhere that is only opened and closed.
type visitor struct {
	net.Conn
	from   string
	closed int
	busy   bool
	in     net.Conn // what the door made of it; nil when it was turned away
}

func (v *visitor) RemoteAddr() net.Addr { return &net.UnixAddr{Name: net.JoinHostPort(v.from, "4711")} }

func (v *visitor) Close() error {
	v.closed++
	return nil
}

// doorRig is a door whose visitors a test names.
type doorRig struct {
	*door
	t   *testing.T
	way *doorway
	all []*visitor
}

func newDoor(t *testing.T, most int, trusted ...string) *doorRig {
	prefixes, _ := listOf(parsePrefix)(strings.Join(trusted, " "))
	way := &doorway{}
	return &doorRig{door: limit(way, most, prefixes), t: t, way: way}
}

// do is what http.Server does: "+0" says that there is a request on the first of all
// connections, "-0" that it is over, "=0" that the connection was hijacked, "x0" that it
// was closed; anything else is an address, from which the next one comes. The books are
// checked after it: no share is larger than it may be, what is counted by address is
// what is counted in all, and nobody left who was busy.
func (d *doorRig) do(step string) {
	d.t.Helper()
	state, ok := map[byte]http.ConnState{'+': http.StateActive, '-': http.StateIdle, '=': http.StateHijacked, 'x': http.StateClosed}[step[0]]
	if ok {
		n, _ := strconv.Atoi(step[1:])
		v := d.all[n]
		if v.busy = step[0] == '+' || step[0] == '='; state == http.StateClosed {
			v.in.Close()
		}
		d.state(v.in, state)
	} else {
		v := &visitor{from: step}
		d.all, d.way.line = append(d.all, v), append(d.way.line, v)
		conn, err := d.Accept()
		if err == nil {
			v.in = conn
			d.state(conn, http.StateNew)
		} else if err != errNobodyThere || v.closed != 1 {
			d.t.Fatalf("turned away: %v, closed %d times", err, v.closed)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	open, idle, left := 0, 0, 0
	for addr, share := range d.shares {
		open += share.open
		idle += share.idle.Len()
		if share.open == 0 || share.idle.Len() > share.open || share.open > half(d.most) && !contains(d.trusted, addr) {
			d.t.Fatalf("%s has %d of %d, %d of them idle", addr, share.open, d.most, share.idle.Len())
		}
	}
	for _, v := range d.all {
		if left += v.closed; v.busy && v.closed > 0 {
			d.t.Fatalf("a busy connection from %s left for another", v.from)
		}
	}
	if int64(open) != d.Open.Load() || open != len(d.all)-left || open > d.most || idle != d.idle.Len() {
		d.t.Fatalf("%d open by address, %d counted, %d seen, %d may be; %d idle by address, %d counted", open, d.Open.Load(), len(d.all)-left, d.most, idle, d.idle.Len())
	}
}

// deserted closes all of them, each twice, and wants that nothing is kept.
func (d *doorRig) deserted() {
	d.t.Helper()
	for _, v := range slices.Repeat(d.all, 2) {
		if v.in != nil {
			v.in.Close()
			d.state(v.in, http.StateClosed)
		}
	}
	if len(d.shares) != 0 || d.Open.Load() != 0 || d.idle.Len() != 0 {
		d.t.Errorf("%d addresses, %d connections, %d idle ones are kept", len(d.shares), d.Open.Load(), d.idle.Len())
	}
}

// TestDoor: no address has more than half of the places, in IPv6 no /64; who
// has been idle longest leaves for who comes, and who is busy never does.
func TestDoor(t *testing.T) {
	for _, tt := range []struct {
		name    string
		most    int
		trusted []string
		steps   string // as do takes them; with ">1" behind it, connection 1 must leave for the new one, with ">" that itself
	}{
		{"one address has half", 4, nil, "b a a a>1 a>2 b"}, // not the first of all, who is somebody else
		{"half of one", 1, nil, "a a>0 a>1"},
		{"half of two", 2, nil, "a a>0 a>1"},
		{"half of three is two", 3, nil, "a a a>0 a>1"},
		{"half of five is three", 5, nil, "a a a a>0 a>1"},
		{"the longest idle leaves, not the oldest", 6, nil, "a a a +0 +1 -1 -0 a>2 a>1 a>0 a>3"},
		{"the busy stay", 4, nil, "a a +0 +1 a> b b +3 +4 c> x0 c"},
		{"the hijacked stay", 4, nil, "a a =0 =1 a> b b =3 =4 c> x0 c"},
		{"the longest idle of all leaves a full house", 4, nil, "a b b a c>0 +1 d>2"},
		{"neighbours in IPv6 are one address", 4, nil, "2001:db8::1 2001:db8::ffff:1 2001:db8:0:0:ffff::2>0 2001:db8:0:1::1 2001:db8:0:1::2"},
		{"a zone is no other network", 4, nil, "fe80::1%eth0 fe80::2%eth1 fe80::3>0"},
		{"IPv4 in either form", 4, nil, "::ffff:192.0.2.1 a ::ffff:192.0.2.1>0 ::ffff:192.0.2.2"},
		{"trusted proxies have no share", 4, []string{"192.0.2.1", "2001:db8::/48"}, "a ::ffff:192.0.2.1 a a a>0 b>1 2001:db8::1>2 2001:db8::2>3 2001:db8::3>4"},
		{"without an address", 2, nil, "pipe pipe>0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDoor(t, tt.most, tt.trusted...)
			var want, got []int // how often each is closed
			for step := range strings.FieldsSeq(tt.steps) {
				what, leaver, leaves := strings.Cut(step, ">")
				if strings.Contains("abcd", what) {
					what = fmt.Sprint("192.0.2.", 1+what[0]-'a')
				}
				if d.do(what); len(d.all) > len(want) {
					want = append(want, 0)
				}
				if n, err := strconv.Atoi(cmp.Or(leaver, strings.TrimPrefix(what, "x"))); err == nil && (leaves || what[0] == 'x') {
					want[n] = 1
				} else if leaves {
					want[len(want)-1] = 1
				}
				got = nil
				for _, v := range d.all {
					got = append(got, v.closed)
				}
				if !slices.Equal(got, want) {
					t.Fatalf("after %s they are closed %v times, want %v", step, got, want)
				}
			}
			if n := d.Closed.Load(); n != int64(strings.Count(tt.steps, ">")) {
				t.Errorf("%d are counted as closed", n)
			}
			d.deserted()
		})
	}
	t.Run("any order", func(t *testing.T) {
		random := mathrand.New(mathrand.NewPCG(1, 2))
		d := newDoor(t, 9, "10.0.0.0/8")
		for range 20000 {
			froms := []string{"192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1", "2001:db8::2", "2001:db8:1::1", "10.0.0.1", "10.0.0.2"}
			step := froms[random.IntN(len(froms))]
			if kind := random.IntN(6); kind < 4 && len(d.all) > 0 {
				step = fmt.Sprint("+-=x"[kind:kind+1], random.IntN(len(d.all)))
			}
			d.do(step)
			d.all = slices.DeleteFunc(d.all, func(v *visitor) bool { return v.closed > 0 })
		}
		if d.Closed.Load() < 100 {
			t.Errorf("%d connections were closed: nothing was tried", d.Closed.Load())
		}
		d.deserted()
	})
}

// TestOneAddressTakesHalf: an address that opens all connections there are
// keeps nobody out, not even itself, cuts no request that is under way, and
// shows in the metrics; with TLS, too.
func TestOneAddressTakesHalf(t *testing.T) {
	cert, key := filepath.Join(t.TempDir(), "cert"), filepath.Join(t.TempDir(), "key")
	writeCertificate(t, cert, key, 1)
	for scheme, env := range map[string][]string{"http": nil, "https": {"SERVER_TLS_CERT_FILE=" + cert, "SERVER_TLS_KEY_FILE=" + key}} {
		t.Run(scheme, func(t *testing.T) {
			server := startServer(t, append(env, "RESPONSE_MODE=held=status", "RESPONSE_TIMEOUT=10m", "SERVER_MAX_SUBSCRIBERS=1", probed[0], probed[1])...)
			const most = 1 + extraConnections
			url := scheme + "://" + server.addr
			from := func(addr string) *http.Transport {
				dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(addr)}}
				return &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
			}
			is := func(metric string, want int) {
				t.Helper()
				eventually(t, fmt.Sprint(metric, " is ", want), func() bool { return metricOf(t, server, metric) == want })
			}
			began := listen(t, from("127.0.0.1"), url+"/subscribe/other")
			held, hangUp := context.WithCancel(t.Context())
			go post(held, from("127.0.0.1"), "POST", url+"/webhooks/held", "{}")
			is("relay_held_webhooks", 1)
			is("relay_connections", 2)
			for range most {
				connect(t, server.addr)
			}
			is("relay_connections_closed_total", 2+most-half(most))
			is("relay_connections", half(most))
			for _, addr := range []string{"127.0.0.2", "127.0.0.3", "127.0.0.1"} {
				if got := post(t.Context(), from(addr), "POST", url+"/webhooks/m", "{}"); got.status != 200 {
					t.Errorf("a webhook from %s: %+v", addr, got)
				}
			}
			post(t.Context(), from("127.0.0.1"), "POST", url+"/webhooks/other", "last")
			if got := began.webhook(t).Body; string(got) != "last" {
				t.Errorf("the stream has the body %q", got)
			}
			hangUp()
			is(`relay_webhooks_total{outcome="refused",reason="gone"}`, 1)
		})
	}
}

// TestSlowHeader: a sender that does not come to the end of its header is cut,
// however busy it looks.
func TestSlowHeader(t *testing.T) {
	for begin, webhooks := range map[string]int{
		"":                                 0,
		"POST /webh":                       0,
		"POST /webhooks/m HTTP/1.1\r\nX: ": 0,
		webhook("") + "POST /webh":         1, // half a second request
	} {
		rigTest(t, nil, func(t *testing.T, p *pipes, server *rig) {
			conn := p.connect(t)
			defer conn.Close()
			began := time.Now()
			go func() {
				for _, err := io.WriteString(conn, begin); err == nil && strings.HasSuffix(begin, ": "); _, err = io.WriteString(conn, "x") { // a byte a second
					time.Sleep(time.Second)
				}
			}()
			io.ReadAll(conn)
			if took := time.Since(began); took < headerTimeout || took > headerTimeout+time.Second || server.Held().Webhooks != webhooks {
				t.Errorf("%q: cut after %s, want %s; %d webhooks, want %d", begin, took, headerTimeout, server.Held().Webhooks, webhooks)
			}
		})
	}
}

// TestIdleConnection: a connection stays for the next request, but not for ever.
func TestIdleConnection(t *testing.T) {
	bubbles(t, func(t *testing.T, p *pipes, rt *http.Transport) {
		newRig(t, p)
		for _, step := range []struct {
			idle  time.Duration // before the request
			conns int           // opened so far
		}{{0, 1}, {idleTimeout - time.Second, 1}, {idleTimeout + 5*time.Second, 2}} {
			time.Sleep(step.idle)
			if r := post(t.Context(), rt, "POST", hooksURL, "x"); r.status != 200 {
				t.Fatalf("after %s: %+v", step.idle, r)
			}
			if n := len(p.open); n != step.conns {
				t.Errorf("after %s: %d connections, want %d", step.idle, n, step.conns)
			}
		}
	})
}

// The repository.

func readFile(t testing.TB, name string) string {
	t.Helper()
	return string(must(os.ReadFile(name)))
}

// TestReadme holds the tables of variables to the program's: each variable is
// in the reference, in the table of its role, with its default; the README has
// some of them.
func TestReadme(t *testing.T) {
	line := regexp.MustCompile("(?m)^(Both roles|Server|Client):$|^\\| *`([A-Z][A-Z0-9_]+)` *\\| *([^|]*?) *\\|")
	rows := func(page string) (list []string) {
		role := ""
		for _, m := range line.FindAllStringSubmatch(readFile(t, page), -1) {
			if role = cmp.Or(m[1], role); m[2] != "" {
				list = append(list, strings.TrimSpace(role+" "+m[2]+" "+strings.Trim(m[3], "`")))
			}
		}
		return list
	}
	var want []string
	short := rows("README.md")
	if len(short) < 10 || len(short) > 14 {
		t.Errorf("the README has %d variables, want about a dozen", len(short))
	}
	for _, s := range settings(&Config{}) {
		row := s.name + " " + cmp.Or(s.fallback, "none")
		want = append(want, map[string]string{"both": "Both roles", "server": "Server", "client": "Client"}[s.role]+" "+row)
		short = slices.DeleteFunc(short, func(r string) bool { return r == row })
	}
	if len(short) > 0 {
		t.Errorf("the README has the rows %q, which are not the program's", short)
	}
	if got := slices.Sorted(slices.Values(rows("docs/reference.md"))); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
		t.Errorf("the reference has the variables\n%q\nwant\n%q", got, slices.Sorted(slices.Values(want)))
	}
}

// TestLinks: what the pages link to is there, a file and a heading of it.
func TestLinks(t *testing.T) {
	heading := regexp.MustCompile("(?m)^#+ (.*)$")
	link := regexp.MustCompile(`\]\(([^)\s#]*)#?([^)\s]*)\)`)
	prose := func(page string) string {
		return regexp.MustCompile("(?ms)^```.*?^```$").ReplaceAllString(readFile(t, page), "")
	}
	anchors := func(page string) (found []string) { // as GitHub makes them
		for _, m := range heading.FindAllStringSubmatch(prose(page), -1) {
			kept := regexp.MustCompile(`[^\pL\pN_ -]`).ReplaceAllString(m[1], "")
			found = append(found, strings.ToLower(strings.ReplaceAll(kept, " ", "-")))
		}
		return found
	}
	for _, page := range append(must(filepath.Glob("docs/*.md")), "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md") {
		links := link.FindAllStringSubmatch(prose(page), -1)
		if page == "README.md" && len(links) < 10 {
			t.Errorf("%s has %d links", page, len(links))
		}
		for _, m := range links {
			target := page
			if strings.HasPrefix(m[1], "https://") {
				continue
			} else if m[1] != "" {
				target = filepath.Join(filepath.Dir(page), m[1])
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %v", page, err)
			} else if m[2] != "" && !slices.Contains(anchors(target), m[2]) {
				t.Errorf("%s links to %s, which has no heading %s", page, target, m[2])
			}
		}
	}
}

// TestProviders: what the README says to type in at a provider, and here.
func TestProviders(t *testing.T) {
	row := regexp.MustCompile("(?m)^\\| (\\w+) \\| [^|`]+: `https://relay\\.example\\.com/webhooks/(\\w+)` \\| [^|]+ \\| `(\\w+)` \\| `(\\w+)` \\| (.+) \\|$")
	var names []string
	for _, m := range row.FindAllStringSubmatch(readFile(t, "README.md"), -1) {
		name, channel, mode, timeout, secret := m[1], m[2], m[3], m[4], m[5]
		names = append(names, name)
		c := configOf(t, "RELAY_MODE=server", "RESPONSE_MODE=accept, "+channel+"="+mode, "RESPONSE_TIMEOUT=1s, "+channel+"="+timeout)
		if got := c.Server.Timeouts.of(channel); channel != strings.ToLower(name) || got < 2*time.Second || got > 15*time.Second {
			t.Errorf("%s has the channel %s, and its sender would wait %s", name, channel, got)
		}
		if strings.HasPrefix(secret, "none") {
			continue
		}
		line := strings.NewReplacer("`", "", "…", "c2VjcmV0").Replace(secret)
		if _, err := parseSecrets(line + "\n"); err != nil || !strings.HasPrefix(line, channel+" ") {
			t.Errorf("%s: the secrets line is %s: %v", name, line, err)
		}
	}
	if want := []string{"GitHub", "GitLab", "Bitbucket", "Gitea", "Stripe", "Slack", "Shopify", "Discord", "Twilio"}; !slices.Equal(names, want) {
		t.Errorf("providers are %q, want %q", names, want)
	}
}

// TestBounds: the reference has the bounds as the package doc has them.
func TestBounds(t *testing.T) {
	_, doc, _ := strings.Cut(readFile(t, "relay.go"), "\n// # Bounds\n")
	doc, _, _ = strings.Cut(doc, "\npackage main\n")
	var want strings.Builder
	for _, m := range regexp.MustCompile("(?m)^//\t(.*\n)").FindAllStringSubmatch(doc+"\n", -1) {
		want.WriteString(m[1])
	}
	_, rest, _ := strings.Cut(readFile(t, "docs/reference.md"), "\n```text\n")
	if got, _, _ := strings.Cut(rest, "```\n"); got != want.String() || strings.Count(got, "\n") < 50 {
		t.Errorf("the bounds in docs/reference.md are not those of the package doc; what must stand there:\n%s", &want)
	}
}

// programMetrics are the metrics of each role.
func programMetrics() map[string][]Metric {
	hub := &Hub{Budget: &Budget{}}
	server := must(NewServer(ServerOptions{}, hub, hub, nil))
	return map[string][]Metric{"server": serverMetrics(server, hub, &RedisBus{}, &door{}), "client": clientMetrics(nil)}
}

// familyNames are the names of metrics, without labels.
func familyNames(metrics []Metric) (names []string) {
	for _, m := range metrics {
		names = append(names, m.Name)
	}
	slices.Sort(names)
	return names
}

// TestReadmeMetrics holds the tables of metrics to the program's.
func TestReadmeMetrics(t *testing.T) {
	table := regexp.MustCompile("(?m)^\\| *metric of the (server|client) .*\n\\|[-| ]*\n((?:\\|.*\n)*)")
	tables := map[string][]string{}
	for _, m := range table.FindAllStringSubmatch(readFile(t, "docs/operations.md"), -1) {
		for _, row := range regexp.MustCompile("(?m)^\\| *`([^`{]+)").FindAllStringSubmatch(m[2], -1) {
			tables[m[1]] = append(tables[m[1]], row[1])
		}
	}
	for role, metrics := range programMetrics() {
		want := familyNames(metrics)
		if got := slices.Compact(slices.Sorted(slices.Values(tables[role]))); !slices.Equal(got, want) {
			t.Errorf("metrics of the %s are %q, want %q", role, got, want)
		}
	}
}

// TestReasons: all that stands in the label is in the table, for webhooks, and for
// streams and reports; and what webhooks are lost for is in the text.
func TestReasons(t *testing.T) {
	page := readFile(t, "docs/operations.md")
	_, section, _ := strings.Cut(page, "\n### Reasons\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var columns [2][]string
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\| *(.*?) *\\| *(.*?) *\\|$").FindAllStringSubmatch(section, -1) {
		for i, text := range m[2:] {
			if text != "" {
				columns[i] = append(columns[i], m[1])
			}
		}
	}
	if want := [2][]string{webhookReasons, subscriberReasons}; !reflect.DeepEqual(columns, want) {
		t.Errorf("reasons are %q, want %q", columns, want)
	}
	for form, reasons := range map[string][]string{"`%s` (": lostReasons, "`%s`": deniedReasons} {
		for _, reason := range reasons {
			if !strings.Contains(page, fmt.Sprintf(form, reason)) {
				t.Errorf("why webhooks are lost, or a client has no stream: %s is missing", reason)
			}
		}
	}
}

// TestAlerts: the rules ask for metrics that the program has, and for the growth of
// counters.
func TestAlerts(t *testing.T) {
	known := familyNames(slices.Concat(slices.Collect(maps.Values(programMetrics()))...))
	rules := yamlBlock(t, "docs/operations.md", "groups:\n").each("groups.0.rules")
	if len(rules) < 5 {
		t.Fatalf("there are %d rules", len(rules))
	}
	for _, rule := range rules {
		alert, expr := rule["alert"], rule["expr"]
		if alert == "" || rule["labels.severity"] == "" || rule["annotations.summary"] == "" {
			t.Errorf("rule %q has no name, severity or summary", alert)
		}
		for _, name := range regexp.MustCompile(`\brelay_\w+`).FindAllString(strings.ReplaceAll(expr, "_bucket[", "["), -1) {
			if !slices.Contains(known, name) {
				t.Errorf("%s asks for %s, which the program does not have", alert, name)
			}
			if counts := strings.HasSuffix(name, "_total"); counts && !strings.Contains(expr, "increase("+name) && !strings.Contains(expr, "rate("+name) {
				t.Errorf("%s: counters are asked for their increase: %s", alert, expr)
			}
		}
		for _, m := range regexp.MustCompile(`(outcome|reason|code)[=!]=?~?"([^"]*)"`).FindAllStringSubmatch(expr, -1) {
			values := map[string][]string{
				"outcome": {outcomeAccepted, outcomeAnswered, outcomeLost, outcomeRefused}, "code": forwardCodes,
				"reason": slices.Concat(webhookReasons, lostReasons, subscriberReasons),
			}[m[1]]
			for value := range strings.SplitSeq(m[2], "|") {
				if !slices.Contains(values, value) {
					t.Errorf("%s: %s is no %s", alert, value, m[1])
				}
			}
		}
	}
}

// TestCompose: both sides of the example start, find each other and Redis, and
// ask themselves how they are.
func TestCompose(t *testing.T) {
	services := yamlBlock(t, "docs/operations.md", "services:\n").under("services")
	entry := regexp.MustCompile(`(?m)^ENTRYPOINT \["(.*)"\]$`).FindStringSubmatch(readFile(t, "Dockerfile"))[1]
	for name, want := range map[string]string{
		"redis":  "0=CMD 1=redis-cli 2=ping", // a shell is not in the image of the others
		"server": "0=CMD 1=" + entry + " 2=-probe 3=ready",
		"client": "0=CMD 1=" + entry + " 2=-probe 3=ready",
	} {
		service := services.under(name)
		if got := service.under("healthcheck.test").String(); got != want {
			t.Errorf("%s: its health command is %q, want %q", name, got, want)
		}
		if name == "redis" {
			continue
		}
		var environ []string
		for variable, value := range service.under("environment") {
			environ = append(environ, variable+"="+value)
		}
		c, warnings, err := loadConfig(environ)
		if err != nil || len(warnings) > 0 {
			t.Fatalf("%s: %v %v", name, err, warnings)
		}
		if c.Role != name || !c.Health || !strings.HasPrefix(c.Server.Token, "${AUTH_TOKEN:?") {
			t.Errorf("%s: its role is %q, its health service %t, its token %q", name, c.Role, c.Health, c.Server.Token)
		}
		if grace, err := time.ParseDuration(service["stop_grace_period"]); err != nil || grace <= c.ShutdownDelay+c.HandlerTimeout {
			t.Errorf("%s: its grace period %s does not cover the time to drain", name, grace)
		}
		if name == "client" && c.Sources[0].Host != "server:3000" || name == "server" && (c.Port != 3000 || c.Redis.Server.Addr != "redis:6379") {
			t.Errorf("%s: it does not find its source or Redis", name)
		}
	}
}

// yaml is a document, flat: scalars by their path, as in spec.ports.0.port.
type yaml map[string]string

// under is what path leads to.
func (y yaml) under(path string) yaml {
	part := yaml{}
	for key, value := range y {
		if rest, ok := strings.CutPrefix(key, path); ok && (rest == "" || rest[0] == '.') {
			part[strings.TrimPrefix(rest, ".")] = value
		}
	}
	return part
}

// each are the items of the list that path leads to.
func (y yaml) each(path string) (items []yaml) {
	for {
		item := y.under(fmt.Sprint(path, ".", len(items)))
		if len(item) == 0 {
			return items
		}
		items = append(items, item)
	}
}

// String is all of it, in order; of a scalar, its value.
func (y yaml) String() string {
	var list []string
	for _, key := range slices.Sorted(maps.Keys(y)) {
		list = append(list, strings.TrimPrefix(key+"="+y[key], "="))
	}
	return strings.Join(list, " ")
}

var (
	yamlField   = regexp.MustCompile(`^([^\s:"'#-][^\s:]*):(?: +(.*))?$`)
	yamlComment = regexp.MustCompile(`(^|\s+)#.*$`)
)

// readYAML reads the plain block form that the documents keep to.
func readYAML(t testing.TB, text string) yaml {
	t.Helper()
	type level struct {
		indent int
		key    string
	}
	y, items, columns := yaml{}, map[string]int{}, map[string]int{} // how many items there are so far, and where they or fields begin, by path
	var open []level
	path := func() string {
		var keys []string
		for _, l := range open {
			keys = append(keys, l.key)
		}
		return strings.Join(keys, ".")
	}
	for line := range strings.SplitSeq(text, "\n") {
		if !strings.Contains(line, `"`) || strings.HasPrefix(strings.TrimSpace(line), "#") {
			line = yamlComment.ReplaceAllString(line, "")
		}
		value := strings.TrimLeft(line, " ")
		if value == "" {
			continue
		}
		indent := len(line) - len(value)
		for len(open) > 0 && open[len(open)-1].indent >= indent {
			open = open[:len(open)-1]
		}
		parent := path()
		item, isItem := strings.CutPrefix(value, "- ")
		if column, ok := columns[parent]; ok && column != indent || isItem != (items[parent] > 0) && ok {
			t.Fatalf("line %q is indented oddly", line)
		}
		if columns[parent] = indent; isItem {
			open = append(open, level{indent, strconv.Itoa(items[parent])})
			items[parent]++
			value, indent = item, indent+2
			columns[path()] = indent
		}
		if m := yamlField.FindStringSubmatch(value); m != nil {
			open = append(open, level{indent, m[1]})
			value = m[2]
		}
		if unquoted, err := strconv.Unquote(value); err == nil {
			value = unquoted
		} else if value != "{}" && (strings.ContainsAny(value[:min(1, len(value))], "\"'[{&*!|>%@`") || strings.Contains(value, ": ")) {
			t.Fatalf("line %q is not in plain block form", line)
		} else if value == "" {
			continue
		}
		if _, twice := y[path()]; twice {
			t.Fatalf("line %q says %s again", line, path())
		}
		y[path()] = value
	}
	return y
}

// yamlBlock is the block of YAML in a page that begins so.
func yamlBlock(t testing.TB, page, begin string) yaml {
	t.Helper()
	_, text, ok := strings.Cut(readFile(t, page), "\n```yaml\n"+begin)
	text, _, closed := strings.Cut(begin+text, "\n```\n")
	if !ok || !closed {
		t.Fatalf("%s has no block that begins with %q", page, begin)
	}
	return readYAML(t, text)
}

// TestManifests holds the manifests to the program: ports, probes, variables, the
// time to drain, what a pod of it may do, and who is let through to whom; and the
// PodMonitor to its pods.
func TestManifests(t *testing.T) {
	c := configOf(t, "RELAY_MODE=server", "KUBERNETES_SERVICE_HOST=10.0.0.1")
	text := readFile(t, "manifests.yaml")
	const commented = "\n# apiVersion: gateway" // the HTTPRoute, which ends the file
	plain, route, _ := strings.Cut(text, commented)
	objects := map[string]yaml{"monitoring PodMonitor": yamlBlock(t, "docs/operations.md", "apiVersion: monitoring.coreos.com/v1\n")} // by side and kind
	var kinds []string
	for _, document := range append(strings.Split(plain, "\n---\n"), strings.ReplaceAll(commented+route, "\n# ", "\n")) {
		if d := readYAML(t, document); len(d) > 0 {
			object := d["metadata.labels.app.kubernetes.io/component"] + " " + d["kind"]
			objects[object], kinds = d, append(kinds, object+" "+d["apiVersion"])
		}
	}
	if want := []string{ // a cluster may not know others, and then kubectl fails on the whole file
		"client Deployment apps/v1", "client NetworkPolicy networking.k8s.io/v1", "gateway HTTPRoute gateway.networking.k8s.io/v1", "redis Deployment apps/v1",
		"redis NetworkPolicy networking.k8s.io/v1", "redis Service v1", "server Deployment apps/v1", "server Ingress networking.k8s.io/v1",
		"server NetworkPolicy networking.k8s.io/v1", "server PodDisruptionBudget policy/v1", "server Service v1",
	}; !slices.Equal(slices.Sorted(slices.Values(kinds)), want) {
		t.Errorf("objects are %q, want %q", kinds, want)
	}

	const pod, container, nginx = "spec.template.spec.", "spec.template.spec.containers.0.", "metadata.annotations.nginx.ingress.kubernetes.io/"
	const probe = "failureThreshold=%d httpGet.path=/%s httpGet.port=9000 initialDelaySeconds=%d periodSeconds=%d successThreshold=1 timeoutSeconds=5"
	const dns = "0.ports.0.port=53 0.ports.0.protocol=UDP 0.ports.1.port=53 0.ports.1.protocol=TCP "
	const path = "backend.service.name=webhook-relay-server-svc backend.service.port.number=3000 path=%s pathType=Prefix"
	const ours = "(server|client) Deployment"
	for _, tt := range []struct {
		objects    string // side and kind, of which a regular expression finds the end
		path, want string // SIDE stands for that of the object
	}{
		{"Deployment", "spec.selector", "matchLabels.app=webhook-relay-SIDE"},
		{"Deployment", "spec.template.metadata.labels", "app=webhook-relay-SIDE app.kubernetes.io/component=SIDE app.kubernetes.io/name=webhook-relay"},
		{"NetworkPolicy", "spec.podSelector", "matchLabels.app=webhook-relay-SIDE"},
		{"Deployment", pod + "securityContext", "runAsGroup=65532 runAsNonRoot=true runAsUser=65532 seccompProfile.type=RuntimeDefault"},
		{"Deployment", pod + "automountServiceAccountToken", "false"},
		{"Deployment", pod + "enableServiceLinks", "false"}, // a Service named server would set SERVER_PORT
		{"Deployment", pod + "containers.1", ""},
		{"Deployment", container + "securityContext", "allowPrivilegeEscalation=false capabilities.drop.0=ALL readOnlyRootFilesystem=true runAsNonRoot=true"},
		{"server Deployment", container + "resources", "limits.cpu=1 limits.memory=512Mi requests.cpu=100m requests.memory=128Mi"},
		{"client Deployment", container + "resources", "limits.cpu=1 limits.memory=256Mi requests.cpu=50m requests.memory=64Mi"},
		{"redis Deployment", container + "resources", "limits.cpu=1 limits.memory=256Mi requests.cpu=50m requests.memory=64Mi"},
		{"PodMonitor", "spec.podMetricsEndpoints", "0.path=/metrics 0.port=health"},
		{"PodMonitor", "spec.selector.matchLabels", "app.kubernetes.io/name=webhook-relay"},
		{"PodMonitor", "spec.selector.matchExpressions", "0.key=app.kubernetes.io/component 0.operator=In 0.values.0=server 0.values.1=client"},
		{"redis Deployment", "spec.replicas", "0"}, // it runs only when it is asked for
		{"redis Deployment", container + "ports", "0.containerPort=6379 0.name=redis"},
		{"redis Deployment", container + "readinessProbe.exec", "command.0=redis-cli command.1=ping"},
		{"redis Deployment", container + "livenessProbe.exec", "command.0=redis-cli command.1=ping"},
		{"redis Service", "spec", "ports.0.name=redis ports.0.port=6379 ports.0.targetPort=6379 selector.app=webhook-relay-redis"},
		{"redis Service", "metadata.name", "webhook-relay-redis"}, // in REDIS_URL
		{ours, "spec.strategy.rollingUpdate.maxUnavailable", "0"},
		{ours, "spec.template.metadata.annotations", "prometheus.io/path=/metrics prometheus.io/port=9000 prometheus.io/scrape=true"},
		{ours, container + "livenessProbe", fmt.Sprintf(probe, 3, "live", 10, 30)},
		{ours, container + "readinessProbe", fmt.Sprintf(probe, 1, "ready", 5, 5)},
		{"server Deployment", container + "ports", fmt.Sprintf("0.containerPort=%d 0.name=web 1.containerPort=%d 1.name=health", c.Port, c.HealthPort)},
		{"client Deployment", container + "ports", fmt.Sprintf("0.containerPort=%d 0.name=health", c.HealthPort)},
		{"server Service", "spec", "ports.0.name=web ports.0.port=3000 ports.0.targetPort=3000 selector.app=webhook-relay-server"},
		{"server Service", "metadata.name", "webhook-relay-server-svc"},
		// Or the drain of a node is blocked, with one replica or with Redis down.
		{"PodDisruptionBudget", "spec", "maxUnavailable=1 selector.matchLabels.app=webhook-relay-SIDE unhealthyPodEvictionPolicy=AlwaysAllow"},
		{"server Ingress", "spec.rules.0.host", "relay.example.com"},
		{"server Ingress", "spec.rules.0.http.paths.0", fmt.Sprintf(path, "/webhooks/")},
		{"server Ingress", "spec.rules.0.http.paths.1", fmt.Sprintf(path, "/subscribe/")},
		{"server Ingress", "spec.rules.0.http.paths.2", ""},
		{"server Ingress", nginx + "proxy-buffering", "off"},
		{"server Ingress", nginx + "proxy-request-buffering", "off"},
		{"server Ingress", nginx + "proxy-read-timeout", "3600"},
		{"server Ingress", nginx + "proxy-send-timeout", "3600"},
		{"server Ingress", nginx + "proxy-body-size", fmt.Sprintf("%dm", max(c.Server.MaxPayload, reportLimit)>>20)},
		{"HTTPRoute", "spec.hostnames", "0=relay.example.com"},
		{"HTTPRoute", "spec.rules.0.matches", "0.path.type=PathPrefix 0.path.value=/webhooks/ 1.path.type=PathPrefix 1.path.value=/subscribe/"},
		{"HTTPRoute", "spec.rules.0.timeouts", "request=0s"}, // the Gateway's would cut streams
		{"HTTPRoute", "spec.rules.0.backendRefs", "0.name=webhook-relay-server-svc 0.port=3000"},
		{"(server|client) NetworkPolicy", "spec.policyTypes", "0=Ingress 1=Egress"},
		{"server NetworkPolicy", "spec.ingress", "0.ports.0.port=3000 0.ports.0.protocol=TCP 1.from.0.namespaceSelector={} 1.ports.0.port=9000 1.ports.0.protocol=TCP"},
		{"server NetworkPolicy", "spec.egress", dns + "1.ports.0.port=6379 1.ports.0.protocol=TCP 1.to.0.podSelector.matchLabels.app=webhook-relay-redis"},
		{"client NetworkPolicy", "spec.ingress", "0.from.0.namespaceSelector={} 0.ports.0.port=9000 0.ports.0.protocol=TCP"},
		{"client NetworkPolicy", "spec.egress", dns + "1.ports.0.port=443 1.ports.0.protocol=TCP 2.to.0.namespaceSelector={}"},
		{"redis NetworkPolicy", "spec.policyTypes", "0=Ingress"},
		{"redis NetworkPolicy", "spec.ingress", "0.from.0.podSelector.matchLabels.app=webhook-relay-server 0.ports.0.port=6379 0.ports.0.protocol=TCP"},
	} {
		found := regexp.MustCompile(tt.objects + "$")
		for object, d := range objects {
			side, _, _ := strings.Cut(object, " ")
			want := strings.ReplaceAll(tt.want, "SIDE", side)
			if got := d.under(tt.path).String(); found.MatchString(object) && got != want {
				t.Errorf("%s: %s is %q, want %q", object, tt.path, got, want)
			}
		}
	}
	if c.Port != 3000 || c.HealthPort != 9000 || checkTimeout >= 5*time.Second || max(c.Server.Heartbeat, bodyTimeout) >= time.Hour {
		t.Error("the program's ports and times are not those of the manifests")
	}

	for _, side := range []string{"server", "client"} {
		d := objects[side+" Deployment"]
		env := map[string]yaml{}
		environ := []string{"AUTH_TOKEN=secret"}
		for _, e := range d.each(container + "env") {
			if env[e["name"]] = e; e["name"] != "AUTH_TOKEN" {
				environ = append(environ, e["name"]+"="+e["value"])
			}
		}
		own, warnings, err := loadConfig(environ)
		if err != nil || len(warnings) > 0 || own.Role != side {
			t.Fatalf("%s: its environment: %v %v", side, err, warnings)
		}
		end := c.HandlerTimeout
		if side == "server" {
			end += c.ShutdownDelay
		}
		var soft, hard, grace int64
		fmt.Sscanf(env["GOMEMLIMIT"]["value"], "%dMiB", &soft)
		fmt.Sscanf(d[container+"resources.limits.memory"], "%dMi", &hard)
		fmt.Sscan(d[pod+"terminationGracePeriodSeconds"], &grace)
		const cut = 240 * time.Second // worker-shutdown-timeout of ingress-nginx
		for what, ok := range map[string]bool{
			"time to drain":                                time.Duration(grace)*time.Second > end,
			"a token from a Secret that must be":           env["AUTH_TOKEN"].String() == "name=AUTH_TOKEN valueFrom.secretKeyRef.key=auth-token valueFrom.secretKeyRef.name=webhook-relay",
			"GOMEMLIMIT below the limit":                   soft > 0 && soft < hard,
			"memory for what is held and reports":          side == "client" || 3*own.HeldBuffer+reportsLimit/2 <= soft<<20,
			"streams that move before the controller cuts": side == "client" || own.Server.StreamMaxAge > 0 && own.Server.StreamMaxAge+own.HandlerTimeout < cut,
			"the channel that the README replaces by sed":  side == "server" || regexp.MustCompile(`/ci-[0-9a-f]{32}/$`).MatchString(own.Sources[0].Path),
		} {
			if !ok {
				t.Errorf("%s: it has not %s", side, what)
			}
		}
	}
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^ *# *- name: (\S+)\n *# *value: "(.*)"$`).FindAllStringSubmatch(plain, -1) {
		names = append(names, m[1])
		if _, warnings, err := loadConfig([]string{"RELAY_MODE=server", m[1] + "=" + m[2]}); err != nil || len(warnings) > 0 {
			t.Errorf("%s in a comment: %v %v", m[1], err, warnings)
		}
	}
	if !strings.Contains(plain, `"redis://webhook-relay-redis:6379"`) || !slices.Equal(names, []string{"RESPONSE_MODE", "TRUSTED_PROXIES", "REDIS_URL"}) {
		t.Errorf("the variables in comments are %q", names)
	}
}

// TestDockerfile: a static binary on nothing, run by a user that is nobody.
func TestDockerfile(t *testing.T) {
	c := configOf(t, "RELAY_MODE=server")
	build, last, _ := strings.Cut(readFile(t, "Dockerfile"), "\nFROM scratch\n")
	for stage, wants := range map[string][]string{
		build: {`--platform=\$BUILDPLATFORM golang:`, `CGO_ENABLED=0 GOOS=\$TARGETOS GOARCH=\$TARGETARCH`, `-trimpath -buildvcs=false -ldflags="-s -w -X main\.release=`},
		last: {
			`(?m)^COPY --from=build /image/ /$`, `org\.opencontainers\.image\.version="\$\{VERSION\}"`, `org\.opencontainers\.image\.revision="\$\{REVISION\}"`,
			`org\.opencontainers\.image\.source="\$\{SOURCE\}"`, `org\.opencontainers\.image\.licenses="MIT"`, `(?m)^ARG VERSION=`, `(?m)^ARG REVISION=`, `(?m)^ARG SOURCE=`,
			`(?m)^USER [1-9]\d*(:[1-9]\d*)?$`, fmt.Sprintf(`(?m)^EXPOSE %d %d$`, c.Port, c.HealthPort), `(?m)^ENTRYPOINT \["/\S+"\]$`,
		},
	} {
		for _, want := range wants {
			if !regexp.MustCompile(want).MatchString(stage) {
				t.Errorf("no %s in\n%s", want, stage)
			}
		}
	}
	if n := strings.Count(last, "COPY "); n != 1 || strings.Contains(last, "\nFROM ") {
		t.Errorf("last stage copies %d times, or is not the last: times of files and directories are those of one tree", n)
	}
}

// TestImage runs what the Dockerfile runs to make the image's tree, twice, in
// different directories: both are the same to the byte and the second, and have
// the version.
func TestImage(t *testing.T) {
	t.Parallel()
	const roots = "/etc/ssl/certs/ca-certificates.crt"
	if _, err := os.Stat(roots); err != nil || runtime.GOOS != "linux" {
		t.Skip("the image is for linux, with the CA bundle of the system")
	}
	_, steps, _ := strings.Cut(readFile(t, "Dockerfile"), "\nCOPY *.go ./\n")
	steps, _, _ = strings.Cut(steps, "\nFROM scratch\n")
	commands := regexp.MustCompile(`(?m)^RUN (.*)$`).FindAllStringSubmatch(strings.ReplaceAll(steps, "\\\n", ""), -1)
	if len(commands) == 0 {
		t.Fatal("the Dockerfile makes no tree")
	}
	epoch := time.Unix(1700000000, 0)
	var trees [2]string
	for i := range trees {
		dir := t.TempDir()
		image := filepath.Join(dir, "image")
		for _, name := range append(must(filepath.Glob("*.go")), "go.mod", "go.sum") {
			if !strings.HasSuffix(name, "_test.go") {
				os.WriteFile(filepath.Join(dir, name), []byte(readFile(t, name)), 0o644)
			}
		}
		for _, command := range commands {
			cmd := exec.Command("sh", "-c", "umask 022; "+strings.ReplaceAll(command[1], "/image", image))
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "VERSION=1.2.3", "TARGETOS=linux", "TARGETARCH="+runtime.GOARCH, "TARGETVARIANT=", fmt.Sprint("SOURCE_DATE_EPOCH=", epoch.Unix()), "GOFLAGS=")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", command[1], err, out)
			}
		}
		filepath.WalkDir(image, func(path string, d os.DirEntry, _ error) error {
			info := must(d.Info())
			line := fmt.Sprint(strings.TrimPrefix(path, image), " ", info.Mode(), " ", info.ModTime().Equal(epoch))
			if !d.IsDir() {
				line += fmt.Sprintf(" %x", sha256.Sum256([]byte(readFile(t, path))))
			}
			trees[i] += line + "\n"
			return nil
		})
		if out, err := exec.Command(filepath.Join(image, "webhook-relay"), "-version").Output(); err != nil || string(out) != "webhook-relay 1.2.3\n" {
			t.Errorf("the image's version is %q, %v", out, err)
		}
	}
	if trees[0] != trees[1] || !strings.Contains(trees[0], roots+" -rw-r--r--") || strings.Contains(trees[0], " false") {
		t.Errorf("the same source gave two images, or one of another time or without a CA bundle:\n%s\n%s", trees[0], trees[1])
	}
}

// emptyPackages stand in for other packages: what they export is of no interest.
type emptyPackages struct{}

func (emptyPackages) Import(path string) (*types.Package, error) {
	pkg := types.NewPackage(path, filepath.Base(path))
	pkg.MarkComplete()
	return pkg, nil
}

// TestArrows keeps the flat package in its layers: which file may use
// declarations of which other one, and which packages.
func TestArrows(t *testing.T) {
	want := []string{
		"broker.go: net/http", "client.go -> broker.go", "client.go: net/http", "health.go: net/http", "redis.go -> broker.go", "redis.go: github.com/gomodule/redigo/redis",
		"relay.go -> broker.go", "relay.go -> client.go", "relay.go -> health.go", "relay.go -> redis.go", "relay.go -> server.go", "relay.go: net/http",
		"server.go -> broker.go", "server.go: net/http",
	}
	found := map[string]string{} // an example of each
	fset := gotoken.NewFileSet()
	var files []*ast.File
	for _, name := range must(filepath.Glob("*.go")) {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file := must(goparser.ParseFile(fset, name, nil, goparser.SkipObjectResolution))
		files = append(files, file)
		for _, spec := range file.Imports {
			if path, _ := strconv.Unquote(spec.Path.Value); strings.HasPrefix(path, "net/http") || strings.Contains(path, ".") {
				found[name+": "+path] = "imports it"
			}
		}
	}
	// broker.go knows the form of messages, and no client or server.
	for _, m := range regexp.MustCompile(`\bhttp\.(\w+)`).FindAllStringSubmatch(readFile(t, "broker.go"), -1) {
		if !regexp.MustCompile(`^(Response|ReadResponse|Header|Status[A-Z]\w+)$`).MatchString(m[1]) {
			t.Errorf("broker.go knows http.%s", m[1])
		}
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	conf := types.Config{Importer: emptyPackages{}, Error: func(error) {}}
	pkg, _ := conf.Check("main", fset, files, info)
	for ident, object := range info.Uses {
		if object.Pkg() == pkg && object.Pos().IsValid() {
			from, to := fset.Position(ident.Pos()), fset.File(object.Pos()).Name()
			if from.Filename != to {
				found[from.Filename+" -> "+to] = fmt.Sprintf("%s uses %s", from, ident.Name)
			}
		}
	}
	if got := slices.Sorted(maps.Keys(found)); !slices.Equal(got, want) {
		t.Errorf("arrows are %q, want %q: %v", got, want, found)
	}
}

// TestStripPrefix is where a webhook goes: the base of the target, one slash,
// and the path as received or what is behind the prefix; a query of the base
// comes first.
func TestStripPrefix(t *testing.T) {
	tests := []struct{ base, strip, path, want string }{
		{"/github-webhook/", "true", "", "/github-webhook/"},
		{"/github-webhook/", "true", "?y=1", "/github-webhook/?y=1"},
		{"/github-webhook/", "true", "/x?y=1", "/github-webhook/x?y=1"},
		{"/github-webhook/", "true", "/", "/github-webhook/"},
		{"/api/webhook", "true", "", "/api/webhook"},
		{"/api/webhook", "true", "/", "/api/webhook/"},
		{"/api/webhook", "true", "//a%2Fb/", "/api/webhook//a%2Fb/"},
		{"", "true", "", "/"},
		{"", "true", "/push", "/push"},
		{"/", "true", "/push", "/push"},
		{"/hooks?key=v", "true", "", "/hooks?key=v"},
		{"/hooks?key=v", "true", "/a?b=1&c", "/hooks/a?key=v&b=1&c"},
		{"/hooks?key=v", "true", "/a?", "/hooks/a?key=v&"},
		{"/hooks?key=v", "false", "/a", "/hooks/webhooks/ci/a?key=v"},
		{"/hooks", "false", "", "/hooks/webhooks/ci"},
	}
	for _, tt := range tests {
		c := newClientOf(t, "http://relay/subscribe/ci", "http://target"+tt.base, "TARGET_STRIP_PREFIX="+tt.strip)
		path, _, _ := strings.Cut(tt.path, "?")
		w := &Webhook{Path: "/webhooks/ci" + path, Query: strings.TrimPrefix(tt.path, path)}
		if got := c.requestTarget(w); got != tt.want {
			t.Errorf("%+v: got %q", tt, got)
		}
	}
}

// TestRecipes runs each row of the README's table of targets against a target that stands
// in for the one it names.
func TestRecipes(t *testing.T) {
	t.Parallel()
	server := startServer(t)
	rows := regexp.MustCompile("(?m)^\\| [^|]+ \\| `(/webhooks/[^`]+)` \\| `(http://[^`]+)` \\| `(true|false)` \\| `POST ([^`]+)` \\|$").FindAllStringSubmatch(readFile(t, "README.md"), -1)
	if len(rows) < 5 {
		t.Fatalf("the README has %d targets", len(rows))
	}
	for _, row := range rows {
		target := newTarget(t, nil)
		base := regexp.MustCompile("^http://[^/]+").ReplaceAllString(row[2], target.url)
		channel, _, _ := strings.Cut(strings.TrimPrefix(row[1], "/webhooks/"), "/")
		client := startClient(t, server.addr, channel, base, "TARGET_STRIP_PREFIX="+row[3])
		if status, _, _ := send(t, "POST", "http://"+server.addr+row[1], "{}"); status != 200 {
			t.Fatalf("%s: %d", row[1], status)
		}
		if got := target.next(t); got.line != "POST "+row[4]+" HTTP/1.1" {
			t.Errorf("%s with %s: target got %q, want POST %s", row[1], row[2], got.line, row[4])
		}
		client.stop()
	}
}

// TestAlertsFire: on a healthy pair of replicas, one of which has no stream, no alert
// fires; and of what may go wrong each fires its own, and no other.
func TestAlertsFire(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("promtool"); err != nil && os.Getenv("CI") != "" {
		t.Skip("no promtool, which .ci/run could not get")
	}
	binary := need(t, "promtool", "prometheus")
	promtool := func(text string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), binary, args...)
		cmd.Stdin = strings.NewReader(text)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	a, b := startReplicas(t, startRedis(t), "AUTH_TOKEN=secret", "RESPONSE_MODE=accept, slack=response")
	client := startClient(t, a.addr, "ci", newTarget(t, nil).url, append(probed, "AUTH_TOKEN=secret", "SOURCE_URL=http://"+a.addr+"/subscribe/ci, http://"+a.addr+"/subscribe/slack")...)
	eventually(t, "both streams", func() bool { return len(client.log.lines("stream ready")) == 2 })
	for range 10 {
		for _, server := range []*program{a, b} {
			postAccepted(t, server, "ci", "x")
			postAccepted(t, server, "slack", "x")
		}
	}
	eventually(t, "all are settled", func() bool { return scrape(t, a)["relay_held_webhooks"]+scrape(t, b)["relay_held_webhooks"] == 0 })

	series := map[string]string{} // as they are now
	for instance, p := range map[string]*program{"a": a, "b": b, "client": client} {
		_, text, _ := send(t, "GET", "http://"+p.health+"/metrics", "")
		promtool(text, "check", "metrics")
		for line := range strings.Lines(text) {
			if m := sampleLine.FindStringSubmatch(strings.TrimSuffix(line, "\n")); m != nil {
				labels := strings.TrimPrefix(m[2]+fmt.Sprintf(",instance=%q,job=\"relay\"", instance), ",")
				series[m[1]+"{"+labels+"}"] = strconv.FormatFloat(must(strconv.ParseFloat(m[3], 64)), 'f', -1, 64)
			}
		}
	}
	series[`process_open_fds{instance="another",job="other"}`], series[`process_max_fds{instance="another",job="other"}`] = "1000", "1000"

	block := regexp.MustCompile("(?s)```yaml\n(groups:\n.*?)```").FindStringSubmatch(readFile(t, "docs/operations.md"))
	rules := tokensFile(t, block[1])
	promtool("", "check", "rules", rules)

	type change struct{ series, values string } // a regular expression; as promtool has them, with @ for the value as it is
	const once = "0+0x5 1+0x25"
	every := func(minute int) string { return fmt.Sprintf("@+%dx30", minute) }
	is := func(value int) string { return fmt.Sprintf("%d+0x30", value) }
	one := func(series, values string) []change { return []change{{series, values}} }
	lost := func(reason string) []change {
		return one(`relay_webhooks_total{outcome="lost",reason="`+reason+`",instance="b".*`, every(1))
	}
	refused := func(reason string) []change {
		return one(`relay_webhooks_total{outcome="refused",reason="`+reason+`",instance="a".*`, every(1))
	}
	answers := func(bounds string) []change {
		return one(`relay_webhook_answer_seconds_bucket{le="(`+bounds+`)",.*`, every(60))
	}
	code := func(code string, more int) change {
		return change{`relay_forwards_total{channel="slack",code="` + code + `",.*`, every(more)}
	}
	cases := []struct {
		name    string
		changes []change
		fires   string
	}{
		{"healthy", nil, ""},
		{"lost, no client", lost("no_client"), "WebhooksLost"},
		{"lost, no space", lost("no_space"), "WebhooksLost"},
		{"lost at the end", lost("shutdown"), "WebhooksLost"},
		{"a stranger's channel", one(lost("unknown_channel")[0].series, once), ""},
		{"a misspelled channel", lost("unknown_channel"), "WebhooksUnheard"},
		{"target down", refused("unreachable"), "WebhooksUnanswered"},
		{"target silent", refused("timeout"), "WebhooksUnanswered"},
		{"nobody there", refused("nobody"), "WebhooksUnanswered"},
		{"bus down", refused("bus"), "WebhooksRefused"},
		{"no space", refused("budget"), "WebhooksRefused"},
		{"a scanner", refused("path"), ""},
		{"no stream anywhere", one("relay_subscribers{.*", is(0)), "NoSubscriber"},
		{"the other replica has the streams", []change{{`relay_subscribers{instance="a".*`, is(0)}, {`relay_subscribers{instance="b".*`, is(2)}}, ""},
		{"no Redis", one(`relay_redis_up{instance="b".*`, is(0)), "RedisDown"},
		{"no stream", one(`relay_stream_ready{channel="ci".*`, is(0)), "NoStream"},
		{"target answers 500", []change{code("5xx", 1), code("2xx", 5)}, "ForwardsFail"},
		{"target answers 404", []change{code("4xx", 1)}, "ForwardsFail"},
		{"target unreachable", []change{code("unreachable", 1)}, "ForwardsFail"},
		{"target seldom fails", []change{code("5xx", 1), code("2xx", 20), code("3xx", 5)}, ""},
		{"one channel's half is full", one(`relay_held_bytes{instance="a".*`, is(120<<20)), "HeldNearLimit"},
		{"some are held", one(`relay_held_bytes{instance="a".*`, is(64<<20)), ""},
		{"wrong token", one(`relay_subscribers_refused_total{reason="token",instance="b".*`, every(2)), "WrongToken"},
		{"wrong address", one(`relay_subscribers_refused_total{reason="address",instance="b".*`, every(2)), ""},
		{"answers take 4 s", answers(`5|10|30|60|\+Inf`), "AnswersSlow"},
		{"answers take 1 s", answers(`1|2.5|5|10|30|60|\+Inf`), ""},
		{"a stranger's guess", one(`relay_subscribers_refused_total{reason="token",instance="b".*`, once), ""},
		{"a client that does not read", one(`relay_subscribers_evicted_total{instance="a".*`, every(1)), "SubscribersStuck"},
		{"no place", one(`relay_connections_closed_total{instance="a".*`, every(1)), "ConnectionsFull"},
		{"descriptors", []change{{`process_open_fds{instance="client".*`, is(900)}, {`process_max_fds{instance="client".*`, is(1000)}}, "DescriptorsFew"},
	}
	var text strings.Builder
	fired := map[string]bool{}
	fmt.Fprintf(&text, "rule_files: [%s]\nevaluation_interval: 1m\ntests:\n", rules)
	for _, tt := range cases {
		fmt.Fprintf(&text, "  - name: %q\n    interval: 1m\n    input_series:\n", tt.name)
		found := make([]bool, len(tt.changes))
		for _, name := range slices.Sorted(maps.Keys(series)) {
			values := "@+0x30"
			for i, c := range tt.changes {
				if regexp.MustCompile("^(?:" + strings.Replace(c.series, "{", `\{`, 1) + ")$").MatchString(name) {
					values, found[i] = c.values, true
				}
			}
			fmt.Fprintf(&text, "      - {series: '%s', values: '%s'}\n", name, strings.Replace(values, "@", series[name], 1))
		}
		if slices.Contains(found, false) {
			t.Errorf("%s: changes %v find no series", tt.name, tt.changes)
		}
		samples := "[]"
		if fired[tt.fires] = true; tt.fires != "" {
			samples = fmt.Sprintf(`[{labels: '{alertname="%s"}', value: 1}]`, tt.fires)
		}
		firing := `group by (alertname) (max_over_time(ALERTS{alertstate="firing"}[30m])) # ` + tt.name // which names it in what promtool says
		fmt.Fprintf(&text, "    promql_expr_test:\n      - {expr: %q, eval_time: 30m, exp_samples: %s}\n", firing, samples)
	}
	for _, m := range regexp.MustCompile(`- alert: (\S+)`).FindAllStringSubmatch(block[1], -1) {
		if !fired[m[1]] {
			t.Errorf("no change makes %s fire", m[1])
		}
	}
	promtool("", "test", "rules", tokensFile(t, text.String()))
}
