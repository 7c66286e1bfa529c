// How tests start a relay and what is around it, send, read and wait: one way each,
// for all test files. What is about the subject of one file stands there.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gomodule/redigo/redis"
)

// What every test may use.

// TestMain lets the test binary be the program itself, or the bare reference
// of BenchmarkIdleStream, in a process of its own.
func TestMain(m *testing.M) {
	switch os.Getenv("RELAY_TEST_MAIN") {
	case "1":
		main()
	case "bare":
		bareMain()
	default:
		flag.Parse()
		set := false
		flag.Visit(func(f *flag.Flag) {
			set = set || f.Name == "test.parallel" || strings.HasPrefix(f.Name, "test.fuzz") && f.Value.String() != ""
		})
		if !set { // most tests that are parallel wait; workers of a fuzz target do not
			flag.Set("test.parallel", "10")
		}
		code := m.Run()
		if line := lacking.String(); line != "" {
			fmt.Println(line)
		}
		os.Exit(code)
	}
}

// patience bounds every wait of a test for something that should happen soon.
const patience = time.Minute

// nobody is where no one listens.
const nobody = "127.0.0.1:1"

// slack is what a busy machine may add to a time that the program bounds.
const slack = 10 * time.Second

// wants is what tests were skipped for. "go test" shows it at the end, and so does
// "go test -v ./..."; of a package that it is given by name or pattern, and that
// passes, go test shows nothing else.
type wants struct {
	mu    sync.Mutex
	tests map[string]bool   // guarded by mu, as the next is; names of tests and benchmarks
	how   map[string]string // to get what is missing, by that
}

// skip ends a test for want of something; CI must not do without.
func (w *wants) skip(t testing.TB, what, how string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("no %s: %s", what, how)
	}
	w.mu.Lock()
	w.tests[t.Name()], w.how[what] = true, how
	w.mu.Unlock()
	t.Skipf("no %s: %s", what, how)
}

// String is one line, or nothing where nobody asked and nothing was skipped.
func (w *wants) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var missing []string
	for _, what := range slices.Sorted(maps.Keys(w.how)) {
		missing = append(missing, fmt.Sprintf("no %s (%s)", what, w.how[what]))
	}
	if len(missing) > 0 {
		return fmt.Sprintf("skipped %d tests: %s", len(w.tests), strings.Join(missing, ", "))
	}
	if testing.Verbose() || os.Getenv("CI") != "" {
		return "skipped no test for want of anything"
	}
	return ""
}

var lacking = wants{tests: map[string]bool{}, how: map[string]string{}}

// need is where program is; a test is skipped without it. pkg is Debian's.
func need(t testing.TB, program, pkg string) (path string) {
	t.Helper()
	for _, name := range []string{program, "/usr/sbin/" + program} { // not on the PATH of everybody
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	lacking.skip(t, program, "apt-get install "+pkg)
	return ""
}

// must is for what cannot fail.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// expect compares, and tells what differs.
func expect[T any](t testing.TB, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: got %.1000s, want %.1000s", what, fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", want))
	}
}

// between checks a time that is not exact.
func between(t testing.TB, what string, least, took, most time.Duration) {
	t.Helper()
	if took < least || took > most {
		t.Errorf("%s: %s, want %s to %s", what, took, least, most)
	}
}

// eventually waits until ok, at most patience.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	if !inTime(ok) {
		t.Fatalf("%s: not within %s", what, patience)
	}
}

// inTime is eventually for any goroutine.
func inTime(ok func() bool) bool {
	pause := time.Millisecond
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(pause) {
		if time.Now().After(deadline) {
			return false
		}
		pause = min(pause*5/4, 20*time.Millisecond)
	}
	return true
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// running runs what ends with its context until stop is called, at the latest at
// the end of the test.
func running(t testing.TB, run func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		run(ctx)
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return stop
}

// The whole program, in this process or as one of its own.

// logBuffer collects what a program logs. It is safe for concurrent use.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// lines returns the logged records whose message is msg.
func (l *logBuffer) lines(msg string) (records []map[string]any) {
	for line := range strings.Lines(l.String()) {
		var record map[string]any
		if strings.Contains(line, `"msg":"`+msg) && json.Unmarshal([]byte(line), &record) == nil && record["msg"] == msg {
			records = append(records, record)
		}
	}
	return records
}

// program is one run of the whole program in this process.
type program struct {
	t      testing.TB
	log    *logBuffer
	cancel context.CancelFunc
	done   chan struct{} // closed when run has returned
	err    error         // what run returned, after done
	addr   string        // of a server: host:port for webhooks and streams
	health string        // host:port for probes, when HEALTH_SERVICE_PORT is set
}

// wait returns the records with msg as soon as there are some, or none when
// the program ended or patience did.
func (p *program) wait(msg string) (records []map[string]any) {
	p.t.Helper()
	eventually(p.t, fmt.Sprintf("%q is in the log", msg), func() bool {
		over := isClosed(p.done) // before the log is read for the last time
		records = p.log.lines(msg)
		return over || len(records) > 0
	})
	return records
}

// stop is SIGTERM and the wait for the end; it returns what run returned.
func (p *program) stop() error {
	p.t.Helper()
	p.cancel()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Errorf("program did not end:\n%s", p.log)
	}
	return p.err
}

// begin runs the program with env, entries of the form NAME=value, until the test ends.
func begin(t testing.TB, env ...string) *program {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	p := &program{t: t, log: &logBuffer{}, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = run(ctx, env, p.log)
	}()
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("log of %s:\n%s", strings.Join(env, " "), p.log)
		}
	})
	return p
}

// start is begin and the wait until the program listens, a server on a free port
// unless env says otherwise.
func start(t testing.TB, env ...string) *program {
	t.Helper()
	p := begin(t, append([]string{"SERVER_PORT=0", "LOG_FORMAT=json", "LOG_LEVEL=debug"}, env...)...)
	listening := func(msg string) string {
		lines := p.wait(msg)
		if len(lines) == 0 {
			return ""
		}
		_, port, _ := net.SplitHostPort(lines[0]["addr"].(string))
		return net.JoinHostPort("127.0.0.1", port)
	}
	p.wait("starting")
	for _, e := range env {
		switch {
		case e == "RELAY_MODE=server":
			p.addr = listening("listening")
		case strings.HasPrefix(e, "HEALTH_SERVICE_PORT="):
			p.health = listening("health service listening")
		}
	}
	return p
}

// startServer is start with RELAY_MODE=server; startClient subscribes to
// channel at server and forwards to target, a URL.
func startServer(t testing.TB, env ...string) *program {
	t.Helper()
	return start(t, append([]string{"RELAY_MODE=server"}, env...)...)
}

func startClient(t testing.TB, server, channel, target string, env ...string) *program {
	t.Helper()
	p := start(t, append([]string{
		"RELAY_MODE=client", "SOURCE_URL=http://" + server + "/subscribe/" + channel + "/",
		"TARGET_BASE_URL=" + target, "RECONNECT_INTERVAL=50",
	}, env...)...)
	p.wait("stream ready")
	return p
}

// process is the test binary as the program.
type process struct {
	cmd         *exec.Cmd
	out, stderr logBuffer
	exited      chan struct{} // closed when it has ended
}

// code waits for the end, after signals.
func (p *process) code(t testing.TB, signals ...os.Signal) int {
	t.Helper()
	for _, signal := range signals {
		p.cmd.Process.Signal(signal)
	}
	select {
	case <-p.exited:
	case <-time.After(patience):
		t.Fatalf("process did not end:\n%s", &p.stderr)
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *process) logged(t testing.TB, msg string) {
	t.Helper()
	eventually(t, msg, func() bool { return len(p.stderr.lines(msg)) > 0 })
}

// launch starts the program with env and args; it is killed when the test ends.
func launch(t testing.TB, env []string, args ...string) *process {
	t.Helper()
	return launchTo(t, nil, env, args...)
}

// configOf is the configuration that env gives the program.
func configOf(t testing.TB, env ...string) *Config {
	t.Helper()
	c, _, err := loadConfig(env)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// freePorts returns ports that nobody listens on. They lie below the range
// from which the kernel takes ports for outgoing connections, so that they are
// still free when a server comes back to them.
func freePorts(t testing.TB, n int) (ports []int) {
	t.Helper()
	for range 1000 {
		port := 20000 + mathrand.IntN(12000)
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil || slices.Contains(ports, port) {
			continue
		}
		l.Close()
		if ports = append(ports, port); len(ports) == n {
			return ports
		}
	}
	t.Fatal("no free port")
	return nil
}

// hostOf is the host:port of a URL of a test server.
func hostOf(url string) string {
	return strings.TrimPrefix(strings.TrimPrefix(url, "http://"), "https://")
}

// probed turns the health service on, without its pause at the end.
var probed = []string{"HEALTH_SERVICE_PORT=0", "HEALTH_SERVICE_SHUTDOWN_DELAY=0"}

// scrape reads /metrics. The channel of a client is left out of the names.
func scrape(t testing.TB, p *program) map[string]float64 {
	t.Helper()
	status, text, header := send(t, "GET", "http://"+p.health+"/metrics", "")
	if status != 200 || !strings.HasPrefix(header.Get("Content-Type"), "text/plain; version=0.0.4") {
		t.Fatalf("/metrics: %d %q", status, header)
	}
	samples := map[string]float64{}
	for line := range strings.Lines(text) {
		if m := sampleLine.FindStringSubmatch(strings.TrimSuffix(line, "\n")); m != nil {
			name := m[1]
			if labels := channelLabel.ReplaceAllString(m[2], ""); labels != "" {
				name += "{" + labels + "}"
			}
			samples[name], _ = strconv.ParseFloat(m[3], 64)
		}
	}
	return samples
}

// metricOf is the value of one line of /metrics.
func metricOf(t testing.TB, p *program, name string) int {
	t.Helper()
	n, ok := scrape(t, p)[name]
	if !ok {
		t.Fatalf("no metric %s", name)
	}
	return int(n)
}

// probeStatus is the status of one of the health service's pages.
func probeStatus(t testing.TB, p *program, path string) int {
	t.Helper()
	status, _, _ := send(t, "GET", "http://"+p.health+path, "")
	return status
}

// awaitReady waits until all of programs say that they are.
func awaitReady(t testing.TB, programs ...*program) {
	t.Helper()
	for _, p := range programs {
		eventually(t, "/ready is 200", func() bool { return probeStatus(t, p, "/ready") == 200 })
	}
}

// Targets.

// recorded is one request as it reached a target, byte for byte.
type recorded struct {
	line    string      // request line without its end
	headers [][2]string // name as received, value bytes
	body    []byte
}

func (r recorded) get(name string) string {
	for _, h := range r.headers {
		if strings.EqualFold(h[0], name) {
			return h[1]
		}
	}
	return ""
}

// fields lists r's headers as "name: value" with lower-case names, sorted by
// name; the values of one name stay in their order. Names in skip are left out.
func (r recorded) fields(skip ...string) (list []string) {
	named := map[string][]string{}
	for _, h := range r.headers {
		name := strings.ToLower(h[0])
		named[name] = append(named[name], name+": "+h[1])
	}
	for _, name := range slices.Sorted(maps.Keys(named)) {
		if !slices.Contains(skip, name) {
			list = append(list, named[name]...)
		}
	}
	return list
}

// target is an HTTP/1.1 target on a raw socket that records bytes.
type target struct {
	url      string
	listener net.Listener
	got      chan recorded // every request, in order of arrival
	answer   func(recorded) string
	wg       sync.WaitGroup
}

func (tg *target) serve(conn net.Conn) {
	r := bufio.NewReader(conn)
	for {
		req, err := readRecorded(r)
		if err != nil {
			return
		}
		tg.got <- req
		answer := tg.answer(req)
		if answer == hangUp {
			return
		}
		if _, err := io.WriteString(conn, answer); err != nil {
			return
		}
	}
}

// next is the next request, within patience.
func (tg *target) next(t testing.TB) recorded {
	t.Helper()
	select {
	case r := <-tg.got:
		return r
	case <-time.After(patience):
		t.Fatal("nothing reached the target")
		return recorded{}
	}
}

const (
	ok200  = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
	hangUp = "hang up" // instead of an answer: close the connection
)

// newTarget starts a target; answer gives the raw response, nil means 200.
// It runs in the connection's goroutine and may block.
func newTarget(t testing.TB, answer func(recorded) string) *target {
	t.Helper()
	l := loopback(t)
	if answer == nil {
		answer = func(recorded) string { return ok200 }
	}
	tg := &target{url: "http://" + l.Addr().String(), listener: l, got: make(chan recorded, 100000), answer: answer}
	var conns sync.Map
	tg.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conns.Store(conn, true)
			tg.wg.Go(func() {
				defer conn.Close()
				tg.serve(conn)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		conns.Range(func(c, _ any) bool { c.(net.Conn).Close(); return true })
		tg.wg.Wait()
	})
	return tg
}

// readRecorded reads one request; it understands Content-Length and chunked.
func readRecorded(r *bufio.Reader) (req recorded, err error) {
	line := func() string {
		var s string
		if err == nil {
			s, err = r.ReadString('\n')
		}
		return strings.TrimSuffix(strings.TrimSuffix(s, "\n"), "\r")
	}
	req.line = line()
	for h := line(); err == nil && h != ""; h = line() {
		name, value, _ := strings.Cut(h, ":")
		req.headers = append(req.headers, [2]string{name, strings.TrimPrefix(value, " ")})
	}
	if err != nil {
		return req, err
	}
	if strings.EqualFold(req.get("Transfer-Encoding"), "chunked") {
		if req.body, err = io.ReadAll(httputil.NewChunkedReader(r)); err == nil {
			for line() != "" { // the trailer
			}
		}
		return req, err
	}
	n, _ := strconv.Atoi(req.get("Content-Length"))
	req.body = make([]byte, n)
	_, err = io.ReadFull(r, req.body)
	return req, err
}

// says is a raw answer of a target with a body.
func says(status int, body string, headers ...string) string {
	return fmt.Sprintf("HTTP/1.1 %d X\r\n%s\r\nContent-Length: %d\r\n\r\n%s", status, strings.Join(append(headers, "X-Of: target"), "\r\n"), len(body), body)
}

// newGate is a target that answers once it is opened.
func newGate(t testing.TB, answer string) (tg *target, open func()) {
	opened := make(chan struct{})
	open = sync.OnceFunc(func() { close(opened) })
	tg = newTarget(t, func(recorded) string {
		<-opened
		return answer
	})
	t.Cleanup(open) // before the target waits for its connections
	return tg, open
}

// Who sends: bytes over a connection, or requests.

// connect is a connection to addr, which lasts for patience, at most until the test
// ends.
func connect(t testing.TB, addr string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return conn
}

// exchange writes request bytes, says that there are no more, and reads the
// answers to their end.
func exchange(t testing.TB, addr, request string) string {
	t.Helper()
	conn := connect(t, addr).(*net.TCPConn)
	io.WriteString(conn, request) // the other side may close before it has read all
	conn.CloseWrite()
	b, _ := io.ReadAll(conn)
	return string(b)
}

// wire sends the bytes of one request on a connection of its own and returns
// the answer.
func wire(t testing.TB, addr, request string) (status int, answer string, header http.Header) {
	t.Helper()
	conn := connect(t, addr)
	defer conn.Close()
	io.WriteString(conn, request) // the other side may refuse it before it has read all
	method, _, _ := strings.Cut(request, " ")
	r, continued := bufio.NewReader(conn), false
	resp, err := http.ReadResponse(r, &http.Request{Method: method})
	if err == nil && resp.StatusCode == 100 {
		continued = true
		resp, err = http.ReadResponse(r, &http.Request{Method: method})
	}
	if err != nil || continued != strings.Contains(request, "Expect: 100-continue") {
		t.Fatalf("answer to %.80q: continued %t, %v", request, continued, err)
	}
	defer resp.Body.Close()
	return resp.StatusCode, string(must(io.ReadAll(resp.Body))), resp.Header
}

// compose is a request that begins with line, as bytes. It has a Host, and the
// Content-Length of its body unless a header line gives another framing.
func compose(line, body string, headers ...string) string {
	var head strings.Builder
	head.WriteString(line + "\r\nHost: relay.example.com\r\n")
	framed := body == ""
	for _, h := range headers {
		head.WriteString(h + "\r\n")
		framed = framed || strings.HasPrefix(h, "Transfer-Encoding:")
	}
	if !framed {
		fmt.Fprintf(&head, "Content-Length: %d\r\n", len(body))
	}
	return head.String() + "\r\n" + body
}

// afresh has a connection for each request.
var afresh = &http.Transport{DisableKeepAlives: true, DisableCompression: true}

// outcome is an answer, read to its end.
type outcome struct {
	status int
	body   string
	header http.Header
	err    error
	at     time.Time
}

// is checks an answer of a target, or of the relay in accept mode.
func (r outcome) is(t testing.TB, status int, body string) {
	t.Helper()
	if r.err != nil || r.status != status || r.body != body {
		t.Errorf("got %d %.200q %v, want %d %.200q", r.status, r.body, r.err, status, body)
	}
}

// refused checks an answer that is the relay's own error. A 503 tells when to come
// back; legacy clients end for good at 429.
func (r outcome) refused(t testing.TB, status int, message string) {
	t.Helper()
	r.is(t, status, relayError(status, message))
	if r.err == nil && (status == 503) != (r.header.Get("Retry-After") == "5") || r.err == nil && r.header.Get("Content-Type") != "application/json" {
		t.Errorf("%d %s: got the header %v", status, message, r.header)
	}
}

// relayError is what the relay itself answers.
func relayError(status int, message string) string {
	return fmt.Sprintf(`{"statusCode":%d,"message":%q}`, status, message)
}

// headerOf is a header of names and values by turns.
func headerOf(pairs ...string) http.Header {
	header := http.Header{}
	for i := 0; i < len(pairs); i += 2 {
		header.Add(pairs[i], pairs[i+1])
	}
	return header
}

// requestOf is a request with headers, which are names and values by turns.
func requestOf(ctx context.Context, method, url string, body io.Reader, headers ...string) *http.Request {
	req := must(http.NewRequestWithContext(ctx, method, url, body))
	req.Header = headerOf(headers...)
	return req
}

// post sends one webhook, or whatever method says, and waits for the answer.
func post(ctx context.Context, rt http.RoundTripper, method, url, body string, headers ...string) (r outcome) {
	ctx, cancel := context.WithTimeout(ctx, time.Hour) // of a bubble, where that is no time
	defer cancel()
	resp, err := rt.RoundTrip(requestOf(ctx, method, url, strings.NewReader(body), headers...))
	if err != nil {
		return outcome{err: err, at: time.Now()}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return outcome{resp.StatusCode, string(b), resp.Header, err, time.Now()}
}

// send is one webhook with a fresh connection; it returns status and body.
func send(t testing.TB, method, url, body string, headers ...string) (status int, answer string, header http.Header) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	o := post(ctx, afresh, method, url, body, headers...)
	if o.err != nil {
		t.Fatal(o.err)
	}
	return o.status, o.body, o.header
}

func webhookURL(p *program, channel, tail string) string {
	return "http://" + p.addr + "/webhooks/" + channel + "/" + tail
}

// postAccepted posts one webhook that must be accepted.
func postAccepted(t testing.TB, p *program, channel, tail string) {
	t.Helper()
	if status, body, _ := send(t, "POST", webhookURL(p, channel, tail), "{}"); status != 200 {
		t.Fatalf("webhook %s: status %d %s, want 200", tail, status, body)
	}
}

// postHeld posts one webhook whose sender waits.
func postHeld(t testing.TB, p *program, channel, tail string) <-chan outcome {
	told := make(chan outcome, 1)
	go func() { // ends with the server's answer, or with the test
		told <- post(t.Context(), afresh, "POST", webhookURL(p, channel, tail), "{}")
	}()
	return told
}

// expectAnswer waits until the sender is told and checks the status. It waits
// less than RESPONSE_TIMEOUT, which brings any answer there is in the end.
func expectAnswer(t testing.TB, told <-chan outcome, status int) outcome {
	t.Helper()
	select {
	case o := <-told:
		if o.err != nil || o.status != status {
			t.Errorf("sender got %d %s %v, want %d", o.status, o.body, o.err, status)
		}
		return o
	case <-time.After(patience):
		t.Fatal("sender was not told")
		return outcome{}
	}
}

// asked is a request as pairs of names and values.
func asked(method, path string, more ...string) []string {
	return append([]string{":method", method, ":scheme", "http", ":path", path, ":authority", "relay.test"}, more...)
}

// frameHTTP2 is one frame of RFC 9113 section 4.1, of stream 1 or of the connection.
func frameHTTP2(kind, flags, stream byte, payload string) string {
	n := len(payload)
	return string([]byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags, 0, 0, 0, stream}) + payload
}

// askHTTP2 speaks HTTP/2 by hand, for what http.Transport would not send: one
// request of names and values by turns. It reads until the answer ends, or has the
// first event of a stream. Status 0: there is none.
func askHTTP2(conn net.Conn, pairs ...string) (status int, body string) {
	var fields []byte // literals without indexing (RFC 7541 section 6.2.2)
	for i, text := range pairs {
		if i%2 == 0 {
			fields = append(fields, 0)
		}
		if n := len(text); n < 127 {
			fields = append(fields, byte(n))
		} else { // RFC 7541 section 5.1
			fields = binary.AppendUvarint(append(fields, 127), uint64(n-127))
		}
		fields = append(fields, text...)
	}
	settings := frameHTTP2(4, 0, 0, "\x00\x04\x7f\xff\xff\xff") + frameHTTP2(8, 0, 0, "\x7f\xff\x00\x00")    // no flow control to speak of
	go io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+settings+frameHTTP2(1, 5, 1, string(fields))) // ends with the connection
	for head, r := make([]byte, 9), bufio.NewReader(conn); ; {
		if _, err := io.ReadFull(r, head); err != nil {
			break
		}
		payload := make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
		if _, err := io.ReadFull(r, payload); err != nil {
			break
		}
		kind, ended := head[3], head[4]&1 != 0
		switch {
		case head[8] != 1:
			continue
		case kind == 0:
			body += string(payload)
		case kind == 1 && payload[0] == 0x88: // RFC 7541 appendix A
			status = 200
		}
		if kind == 3 || ended || strings.Contains(body, "event: ready\n") {
			break
		}
	}
	if m := regexp.MustCompile(`(?:"statusCode":|HTTP Error )(\d+)`).FindStringSubmatch(body); m != nil { // an error repeats it
		status, _ = strconv.Atoi(m[1])
	}
	return status, body
}

// Who reads streams.

// features is what our own client announces.
var features = []string{"X-Relay-Features", "http, respond, drain"}

// seen is one event of a stream.
type seen struct {
	name, id, data string
	at             time.Time
}

// webhook is what the stream says of a webhook, read as our client does.
func (e seen) webhook(t testing.TB) *Webhook {
	t.Helper()
	w, err := decodeOwn(e.name, e.id, []byte(e.data))
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// listener is one stream whose events are collected.
type listener struct {
	client string // of no other one, unless its headers say so
	resp   *http.Response
	err    error // instead of resp
	close  context.CancelFunc
	done   chan struct{} // closed at the end of the stream

	mu     sync.Mutex
	events []seen // guarded by mu
	taken  int    // guarded by mu: of events

	ended time.Time // once it is done
}

func (l *listener) leave() {
	l.close()
	<-l.done
}

// report says a of the event id, as the client of this stream, and returns the
// status of that.
func (l *listener) report(t testing.TB, rt http.RoundTripper, id string, a Answer) int {
	t.Helper()
	return post(t.Context(), rt, "POST", streamURL+"responses", reportOf(id, a), "X-Relay-Client", l.client).status
}

// got are the events of such a name so far; a message is a webhook in either form.
func (l *listener) got(name string) (events []seen) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.events {
		if e.name == name || name == "message" && e.name == "webhook" {
			events = append(events, e)
		}
	}
	return events
}

// next waits for the nth webhook of the stream, from 1.
func (l *listener) next(t testing.TB, n int) seen {
	t.Helper()
	eventually(t, "event", func() bool { return len(l.got("message")) >= n })
	return l.got("message")[n-1]
}

// becomesReady waits for the first ready, in any goroutine.
func (l *listener) becomesReady() error {
	if inTime(func() bool { return isClosed(l.done) || len(l.got("ready")) > 0 }); len(l.got("ready")) > 0 {
		return nil
	}
	if l.err != nil {
		return l.err
	}
	return fmt.Errorf("no ready: %s", l.resp.Status)
}

// take is the next webhook that was not taken yet, nil when there is none.
func (l *listener) take() (*Webhook, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.taken < len(l.events) {
		e := l.events[l.taken]
		l.taken++
		if e.name == "message" || e.name == "webhook" {
			return decodeOwn(e.name, e.id, []byte(e.data))
		}
	}
	return nil, nil
}

// await waits for what take takes, in any goroutine.
func (l *listener) await() (w *Webhook, err error) {
	inTime(func() bool {
		over := isClosed(l.done) // before it is asked for the last time
		w, err = l.take()
		return w != nil || err != nil || over
	})
	if w == nil && err == nil {
		err = errors.New("no webhook on the stream")
	}
	return w, err
}

// webhook is await for the test's goroutine.
func (l *listener) webhook(t testing.TB) *Webhook {
	t.Helper()
	w, err := l.await()
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// only checks that the stream brings the webhook with this tail, and once.
func (l *listener) only(t testing.TB, tail string) {
	t.Helper()
	if w := l.webhook(t); !strings.HasSuffix(w.Path, "/"+tail) {
		t.Fatalf("stream brought %s, want %s", w.Path, tail)
	}
	if w, err := l.take(); w != nil || err != nil {
		t.Fatalf("stream brought more than it should: %v %v", w, err)
	}
}

// endedAt waits for the end of the stream.
func (l *listener) endedAt(t testing.TB) time.Time {
	t.Helper()
	select {
	case <-l.done:
	case <-time.After(time.Hour):
		t.Fatal("the stream does not end")
	}
	return l.ended
}

// subscribe opens the stream at url, until ctx ends, and returns once its status
// is known.
func subscribe(ctx context.Context, rt http.RoundTripper, url string, headers ...string) *listener {
	ctx, cancel := context.WithCancel(ctx)
	req := requestOf(ctx, "GET", url, nil, headers...)
	if strings.Contains(req.Header.Get("X-Relay-Features"), "respond") && req.Header["X-Relay-Client"] == nil {
		req.Header.Set("X-Relay-Client", rand.Text())
	}
	l := &listener{client: req.Header.Get("X-Relay-Client"), close: cancel, done: make(chan struct{})}
	if l.resp, l.err = rt.RoundTrip(req); l.err != nil {
		cancel()
		close(l.done)
		return l
	}
	go func() {
		defer close(l.done)
		defer l.resp.Body.Close()
		p := newParser(l.resp.Body)
		for m, err := p.next(); err == nil; m, err = p.next() {
			l.mu.Lock()
			l.events = append(l.events, seen{m.name, m.id, string(m.data), time.Now()})
			l.mu.Unlock()
		}
		l.ended = time.Now()
	}()
	return l
}

// listen opens the stream at url, which ends with the test.
func listen(t testing.TB, rt http.RoundTripper, url string, headers ...string) *listener {
	t.Helper()
	l := subscribe(context.Background(), rt, url, headers...)
	if l.err != nil {
		t.Fatal(l.err)
	}
	t.Cleanup(l.leave)
	if l.resp.StatusCode != 200 {
		t.Errorf("stream: status %d", l.resp.StatusCode)
	}
	return l
}

// Servers without a program around them.

// testReplica is a name as replicas give themselves.
const testReplica = "REPLICAAAAAAA"

// testID is the id of an event that a rig might have, but has not.
const testID = testReplica + "-AAAAAAAAAAAAAAAAAAAAAAAAAA"

func loopback(testing.TB) net.Listener { return must(net.Listen("tcp", "127.0.0.1:0")) }

func serveOn(t testing.TB, web *http.Server, l net.Listener) {
	running(t, func(context.Context) { web.Serve(l) })
	t.Cleanup(func() { web.Close() })
}

// rig is a server without run around it: on any listener, with the settings
// that env gives the program.
type rig struct {
	*Server
	hub *Hub
	log *logBuffer
}

// streamCount is how many streams there are.
func (r *rig) streamCount() int {
	n, _ := r.hub.Count()
	return n
}

// endings are the reasons why streams ended.
func (r *rig) endings() (reasons []any) {
	for _, line := range r.log.lines("subscriber gone") {
		reasons = append(reasons, line["reason"])
	}
	return reasons
}

// outcomes is what r counts of webhooks, and of subscribers that it refuses, by the
// labels.
func (r *rig) outcomes() map[string]int {
	counts := map[string]int{}
	text := (&Health{Metrics: serverMetrics(r.Server, r.hub, nil, &door{})}).exposition()
	for _, m := range outcomeSample.FindAllStringSubmatch(text, -1) {
		counts[m[1]], _ = strconv.Atoi(m[2])
	}
	return counts
}

// newRig serves on l until the test ends.
func newRig(t testing.TB, l net.Listener, env ...string) *rig {
	t.Helper()
	return newRigOn(t, l, func(h *Hub) Bus { return h }, env...)
}

// newRigOn is newRig with a bus around its hub.
func newRigOn(t testing.TB, l net.Listener, around func(*Hub) Bus, env ...string) *rig {
	t.Helper()
	c := configOf(t, append([]string{"RELAY_MODE=server"}, env...)...)
	r := &rig{hub: &Hub{Limits: c.Limits, Budget: &Budget{Limit: c.HeldBuffer}}, log: &logBuffer{}}
	log := newLogger(c, r.log)
	c.Server.Replica = testReplica
	r.Server = must(NewServer(c.Server, r.hub, around(r.hub), log))
	r.hub.OnSignal = r.signal
	running(t, func(ctx context.Context) { r.Run(ctx) })
	web := webServer(r.Server, log)
	if d, ok := l.(interface { // a door, which wants to hear of its connections
		state(net.Conn, http.ConnState)
	}); ok {
		web.ConnState = d.state
	}
	serveOn(t, web, l)
	t.Cleanup(func() { // before the listener goes: streams that were taken from net/http are ours to end
		leaveAll(r.hub, errShutdown)
		r.streams.Wait()
	})
	return r
}

// newClientOf is a Client of the source for target with the program's defaults.
func newClientOf(t testing.TB, source, target string, env ...string) *Client {
	t.Helper()
	c := configOf(t, append([]string{"RELAY_MODE=client", "SOURCE_URL=" + source, "TARGET_BASE_URL=" + target}, env...)...)
	return NewClient(c.clientOf(c.Sources[0]), slog.New(slog.DiscardHandler))
}

// total is what was counted for any reason.
func total(r tally) (n int64) {
	for _, counter := range r {
		n += counter.Load()
	}
	return n
}

func heldBy(s *Server) (webhooks int, size int64) {
	state := s.Held()
	return state.Webhooks, state.Bytes
}

// leaveAll ends every stream of h for reason.
func leaveAll(h *Hub, reason error) {
	for _, sub := range h.Subscribers() {
		h.Leave(sub, reason)
	}
}

// Bubbles. Whole relays run in testing/synctest over pipes, so that hours pass in
// milliseconds and nothing depends on the machine's speed. A bubble does not end
// before all its goroutines do: every such test is one for leaks, too.

// pipes is a listener whose connections are pairs of net.Pipe.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once

	mu   sync.Mutex
	open []net.Conn // guarded by mu: the dialling ends
	down bool       // guarded by mu: dialling fails
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func (p *pipes) Addr() net.Addr { return pipeAddr }

// dial is an http.Transport's DialContext.
func (p *pipes) dial(context.Context, string, string) (net.Conn, error) {
	near, far := net.Pipe()
	p.mu.Lock()
	down := p.down
	p.open = append(p.open, near)
	p.mu.Unlock()
	if !down {
		select {
		case p.conns <- pipeConn{far}:
			return near, nil
		case <-p.done:
		}
	}
	return nil, fmt.Errorf("dial: connection refused")
}

// connect is a bare connection.
func (p *pipes) connect(t testing.TB) net.Conn { return must(p.dial(t.Context(), "", "")) }

// cut breaks all connections, as a power failure does; with down, none comes up again.
func (p *pipes) cut(down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = down
	for _, conn := range p.open {
		conn.Close()
	}
	p.open = nil
}

// transport speaks to p until the test ends, HTTP/2 without TLS if h2.
func (p *pipes) transport(t testing.TB, h2 bool) *http.Transport {
	var protocols http.Protocols
	protocols.SetHTTP1(!h2)
	protocols.SetUnencryptedHTTP2(h2)
	transport := &http.Transport{DialContext: p.dial, Protocols: &protocols, DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	return transport
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

// pipeAddr is the address of everybody, from the range for documentation.
var pipeAddr = &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 4711}

// pipeConn has an address as a connection has.
type pipeConn struct{ net.Conn }

func (pipeConn) RemoteAddr() net.Addr { return pipeAddr }

// inBubble is synctest.Test with a second at the end, in which net/http closes
// what it leaves open for half of one.
func inBubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		t.Cleanup(func() { time.Sleep(time.Second) })
		f(t)
	})
}

// rigTest runs f in a bubble with a server behind p.
func rigTest(t *testing.T, env []string, f func(t *testing.T, p *pipes, r *rig)) {
	t.Helper()
	inBubble(t, func(t *testing.T) {
		p := newPipes()
		f(t, p, newRig(t, p, env...))
	})
}

// bubbles runs f in one bubble for HTTP/1.1 and in one for HTTP/2.
func bubbles(t *testing.T, f func(t *testing.T, p *pipes, rt *http.Transport)) {
	for name, h2 := range map[string]bool{"HTTP1": false, "HTTP2": true} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				p := newPipes()
				f(t, p, p.transport(t, h2))
			})
		})
	}
}

// relay is a server in a bubble, and who speaks to it.
type relay struct {
	*rig
	t    testing.TB
	p    *pipes
	rt   *http.Transport // of providers and subscribers
	base string          // of their URLs
}

// post is one webhook to a channel and what stands behind it.
func (r *relay) post(tail, body string, headers ...string) outcome {
	return r.ask("POST", "/webhooks/"+tail, body, headers...)
}

// posted is post whose outcome comes later.
func (r *relay) posted(tail, body string, headers ...string) <-chan outcome {
	c := make(chan outcome, 1)
	go func() { c <- r.post(tail, body, headers...) }()
	synctest.Wait()
	return c
}

// ask is any request.
func (r *relay) ask(method, path, body string, headers ...string) outcome {
	return post(r.t.Context(), r.rt, method, r.base+path, body, headers...)
}

// listen opens a stream of channel, which ends with the test.
func (r *relay) listen(channel string, headers ...string) *listener {
	r.t.Helper()
	return listen(r.t, r.rt, r.base+"/subscribe/"+channel+"/", headers...)
}

// report says a of the event id, as the client of that stream on channel ci.
func (r *relay) report(l *listener, id string, a Answer) {
	r.t.Helper()
	expect(r.t, "report", l.report(r.t, r.rt, id, a), 204)
}

// opens is what a report gets that nobody waits for: 204 if such headers open channel
// ci.
func (r *relay) opens(headers ...string) int {
	return r.ask("POST", "/subscribe/ci/responses", reportOf(testID, Answer{Status: 200}), headers...).status
}

// relayTest runs f in one bubble where HTTP/1.1 is spoken, and in one with HTTP/2.
// Nothing of what f does may stay held.
func relayTest(t *testing.T, env []string, f func(*testing.T, *relay)) {
	t.Helper()
	relayOn(t, func(h *Hub) Bus { return h }, env, f)
}

// relayOn is relayTest with a bus around the hub.
func relayOn(t *testing.T, around func(*Hub) Bus, env []string, f func(*testing.T, *relay)) {
	t.Helper()
	bubbles(t, func(t *testing.T, p *pipes, rt *http.Transport) {
		r := &relay{rig: newRigOn(t, p, around, env...), t: t, p: p, rt: rt, base: "http://relay.test"}
		f(t, r)
		leaveAll(r.hub, errShutdown)
		time.Sleep(2*r.opts.HoldTime + returnTime)
		n, size := heldBy(r.Server)
		if n != 0 || size != 0 || r.strange != 0 || r.reports.Used() != 0 {
			t.Errorf("%d webhooks, %d bytes, %d of strangers, %d of reports stay held", n, size, r.strange, r.reports.Used())
		}
	})
}

const hooksURL, streamURL = "http://relay.test/webhooks/ci", "http://relay.test/subscribe/ci/"

// Certificates and watched files.

// authority issues certificates, its own first.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// issue makes a certificate of template, which signs itself when a is nil.
func (a *authority) issue(template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	parent, signer := template, key
	if a != nil {
		parent, signer = a.cert, a.key
	}
	return must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)))), key
}

// pair is a certificate for a client, with its key, as change would have it;
// between stand behind it.
func (a *authority) pair(t testing.TB, change func(*x509.Certificate), between ...*authority) *tls.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "client"}, NotAfter: time.Now().Add(24 * time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if change != nil {
		change(template)
	}
	cert, key := a.issue(template)
	pair := &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
	for _, b := range between {
		pair.Certificate = append(pair.Certificate, b.cert.Raw)
	}
	return pair
}

// newAuthority is an authority that parent vouches for; nil: nobody does.
func newAuthority(t testing.TB, parent *authority) *authority {
	t.Helper()
	a := &authority{}
	a.cert, a.key = parent.issue(&x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: rand.Text()}, NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
	})
	a.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
	return a
}

// writePEM writes a block to a file of the test and returns its name.
func writePEM(t testing.TB, kind string, der []byte) string {
	t.Helper()
	return tokensFile(t, string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})))
}

// writePair puts pair where the program looks for it, one file after the other.
func writePair(t testing.TB, certFile, keyFile string, pair *tls.Certificate) {
	t.Helper()
	keyDER := must(x509.MarshalPKCS8PrivateKey(pair.PrivateKey))
	var chain []byte
	for _, der := range pair.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	replace(t, certFile, chain)
	replace(t, keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
}

// writeCertificate is writePair for the server at 127.0.0.1 or relay.test, with
// that serial number.
func writeCertificate(t testing.TB, certFile, keyFile string, serial int64) {
	t.Helper()
	writePair(t, certFile, keyFile, (*authority)(nil).pair(t, func(c *x509.Certificate) {
		c.SerialNumber, c.ExtKeyUsage = big.NewInt(serial), nil
		c.IPAddresses, c.DNSNames = []net.IP{net.IPv4(127, 0, 0, 1)}, []string{"relay.test"}
	}))
}

// newTLSServer is a server with a certificate that no root vouches for.
func newTLSServer(t testing.TB, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(handler)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// tokensFile is a file with such lines, which lives as long as the test.
func tokensFile(t testing.TB, text string) string {
	name := filepath.Join(t.TempDir(), "tokens")
	replace(t, name, []byte(text))
	return name
}

// replace puts text into a file as a whole.
func replace(t testing.TB, file string, text []byte) {
	t.Helper()
	if err := cmp.Or(os.WriteFile(file+".new", text, 0o600), os.Rename(file+".new", file)); err != nil {
		t.Fatal(err)
	}
}

// A true Redis, and the network in front of it.

// redisServer is a redis-server process of one test's own.
type redisServer struct {
	t         testing.TB
	addr, url string // url is what REDIS_URL is set to
	args      []string
	cmd       *exec.Cmd
}

// restart starts the process on the same port and waits until it takes connections.
func (r *redisServer) restart() {
	r.t.Helper()
	out := &logBuffer{}
	r.cmd = exec.Command(r.args[0], r.args[1:]...)
	r.cmd.Stdout, r.cmd.Stderr = out, out
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	if !inTime(func() bool {
		conn, err := net.Dial("tcp", r.addr)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}) {
		r.t.Fatalf("redis-server takes no connections:\n%s", out)
	}
}

// stop kills the process at once, frozen or not: nothing is said any more.
func (r *redisServer) stop() { r.end(os.Kill) }

// end waits for the process after by: at SIGTERM it has written to the subscribers,
// too, what it has answered to a publisher.
func (r *redisServer) end(by os.Signal) {
	r.cmd.Process.Signal(by)
	r.cmd.Wait()
}

// freeze leaves the process in a state in which the kernel accepts for it and
// nobody answers.
func (r *redisServer) freeze() { r.cmd.Process.Signal(syscall.SIGSTOP) }

func (r *redisServer) thaw() { r.cmd.Process.Signal(syscall.SIGCONT) }

func (r *redisServer) cli(cmd string, args ...any) any {
	conn := must(redis.DialURL(r.url))
	defer conn.Close()
	return must(conn.Do(cmd, args...))
}

// channels is what PUBSUB CHANNELS says, sorted.
func (r *redisServer) channels() []string {
	return slices.Sorted(slices.Values(must(redis.Strings(r.cli("PUBSUB", "CHANNELS", "*"), nil))))
}

// subscriptions is how many connections are subscribed to a Redis channel.
func (r *redisServer) subscriptions(name string) int {
	return must(redis.IntMap(r.cli("PUBSUB", "NUMSUB", name), nil))[name]
}

// startRedis starts a redis-server on a free port until the test ends.
func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	binary, port := need(t, "redis-server", "redis-server"), strconv.Itoa(freePorts(t, 1)[0])
	r := &redisServer{t: t, addr: "127.0.0.1:" + port, url: "redis://127.0.0.1:" + port}
	r.args = append([]string{binary, "--bind", "127.0.0.1", "--port", port, "--dir", t.TempDir(), "--save", "", "--appendonly", "no", "--daemonize", "no"}, args...)
	r.restart()
	t.Cleanup(r.stop)
	return r
}

// startOver starts a server whose bus is the Redis at url.
func startOver(t testing.TB, url string, env ...string) *program {
	t.Helper()
	return startServer(t, slices.Concat(probed, []string{"REDIS_URL=" + url, "HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT=2s"}, env)...)
}

// startReplicas starts two servers that are one relay over r.
func startReplicas(t testing.TB, r *redisServer, env ...string) (a, b *program) {
	t.Helper()
	a, b = startOver(t, r.url, env...), startOver(t, r.url, env...)
	awaitReady(t, a, b)
	return a, b
}

func newLink(t testing.TB, to ...string) *tcpLink {
	t.Helper()
	listener := loopback(t)
	l := &tcpLink{listener: listener, addr: listener.Addr().String(), spy: func(net.Conn, []byte) {}, to: to, conns: map[net.Conn]bool{}, most: [2]int{-1, -1}}
	l.changed = sync.NewCond(&l.mu)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			if far := l.connect(near); far != nil {
				wg.Go(func() { l.pass(far, near, 0) })
				wg.Go(func() { l.pass(near, far, 1) })
			}
		}
	})
	t.Cleanup(func() {
		listener.Close()
		l.route()
		wg.Wait()
	})
	return l
}

// tcpLink is a TCP proxy in front of servers: a network that a test can break.
type tcpLink struct {
	listener net.Listener
	addr     string
	spy      func(near net.Conn, said []byte) // set before use: hears what goes to a server before that does
	tried    atomic.Int64                     // connections that came
	sent     atomic.Int64                     // bytes that went to servers

	mu      sync.Mutex
	changed *sync.Cond // of what follows
	to      []string   // in turn; none: nobody answers
	conns   map[net.Conn]bool
	most    [2]int // bytes that each connection may carry to its server and from it; below 0: all
}

// connect dials for one accepted connection, and remembers both; it closes that
// when nobody answers.
func (l *tcpLink) connect(near net.Conn) (far net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if turn := int(l.tried.Add(1)); len(l.to) > 0 {
		if far, err := net.Dial("tcp", l.to[turn%len(l.to)]); err == nil {
			l.conns[near], l.conns[far] = true, true
			return far
		}
	}
	near.Close()
	return nil
}

// pass copies from src to dst while that is allowed, and closes both at the end.
func (l *tcpLink) pass(dst, src net.Conn, way int) {
	defer dst.Close()
	defer src.Close()
	buf := make([]byte, 32<<10)
	for total := 0; ; {
		n, err := src.Read(buf)
		if way == 0 {
			l.spy(src, buf[:n])
		}
		for rest := buf[:n]; len(rest) > 0; {
			k := l.admit(src, way, total, len(rest))
			if _, err := dst.Write(rest[:k]); err != nil || k == 0 {
				return
			}
			if rest, total = rest[k:], total+k; way == 0 {
				l.sent.Add(int64(k))
			}
		}
		if err != nil {
			l.admit(src, way, total, 1) // an end waits, too
			return
		}
	}
}

// admit waits until some of n bytes may pass and returns how many; none when
// the connection is cut.
func (l *tcpLink) admit(src net.Conn, way, total, n int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.conns[src] {
		if l.most[way] < 0 {
			return n
		}
		if k := min(n, l.most[way]-total); k > 0 {
			return k
		}
		l.changed.Wait()
	}
	return 0
}

// set changes what connect and admit look at.
func (l *tcpLink) set(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
	l.changed.Broadcast()
}

func (l *tcpLink) limit(most int) { l.set(func() { l.most[0] = most }) }

func (l *tcpLink) silence() { l.set(func() { l.most[1] = 0 }) }

func (l *tcpLink) speak() { l.set(func() { l.most[1] = -1 }) }

// route cuts every connection and sends new ones to other addresses, or nowhere.
func (l *tcpLink) route(to ...string) {
	l.set(func() {
		l.to = to
		for conn := range l.conns {
			conn.Close()
		}
		clear(l.conns)
	})
}
