package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// patience bounds every wait of a test for something that should happen soon.
const patience = 15 * time.Second

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
		if json.Unmarshal([]byte(line), &record) == nil && record["msg"] == msg {
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

// start runs the program with env, entries of the form NAME=value, until the
// test ends. A server listens on a free port unless env says otherwise.
func start(t testing.TB, env ...string) *program {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	p := &program{t: t, log: &logBuffer{}, cancel: cancel, done: make(chan struct{})}
	env = append([]string{"SERVER_PORT=0", "LOG_FORMAT=json", "LOG_LEVEL=debug"}, env...)
	go func() {
		defer close(p.done)
		p.err = run(ctx, env, p.log)
	}()
	t.Cleanup(func() {
		p.cancel()
		select {
		case <-p.done:
		case <-time.After(patience):
			t.Errorf("program did not end:\n%s", p.log)
		}
		if t.Failed() {
			t.Logf("log of %s:\n%s", strings.Join(env, " "), p.log)
		}
	})
	if len(p.wait("starting")) == 0 {
		return p
	}
	loopback := func(record map[string]any) string {
		_, port, _ := net.SplitHostPort(record["addr"].(string))
		return net.JoinHostPort("127.0.0.1", port)
	}
	for _, e := range env {
		switch {
		case e == "RELAY_MODE=server":
			if lines := p.wait("listening"); len(lines) > 0 {
				p.addr = loopback(lines[0])
			}
		case strings.HasPrefix(e, "HEALTH_SERVICE_PORT="):
			if lines := p.wait("health service listening"); len(lines) > 0 {
				p.health = loopback(lines[0])
			}
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

// wait returns the records with msg as soon as there are some, or none when
// the program ended or patience did.
func (p *program) wait(msg string) []map[string]any {
	p.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		if records := p.log.lines(msg); len(records) > 0 {
			return records
		}
		select {
		case <-p.done:
			return p.log.lines(msg)
		case <-time.After(2 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("no %q in the log:\n%s", msg, p.log)
		}
	}
}

// stop is SIGTERM and the wait for the end; it returns what run returned.
func (p *program) stop() error {
	p.t.Helper()
	p.cancel()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("program did not end:\n%s", p.log)
	}
	return p.err
}

// eventually waits until ok, at most patience.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, patience)
		}
	}
}

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

// target is an HTTP/1.1 target on a raw socket that records bytes.
type target struct {
	url      string
	listener net.Listener
	got      chan recorded // every request, in order of arrival
	answer   func(recorded) string
	wg       sync.WaitGroup
}

const ok200 = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

// newTarget starts a target; answer gives the raw response, nil means 200.
// It runs in the connection's goroutine and may block.
func newTarget(t testing.TB, answer func(recorded) string) *target {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
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

func (tg *target) serve(conn net.Conn) {
	r := bufio.NewReader(conn)
	for {
		req, err := readRecorded(r)
		if err != nil {
			return
		}
		tg.got <- req
		if _, err := io.WriteString(conn, tg.answer(req)); err != nil {
			return
		}
	}
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
		for {
			n, convErr := strconv.ParseInt(line(), 16, 64)
			if err != nil || convErr != nil {
				return req, fmt.Errorf("chunk: %v %v", err, convErr)
			}
			chunk := make([]byte, n+2)
			if _, err = io.ReadFull(r, chunk); err != nil || n == 0 {
				return req, err
			}
			req.body = append(req.body, chunk[:n]...)
		}
	}
	n, _ := strconv.Atoi(req.get("Content-Length"))
	req.body = make([]byte, n)
	_, err = io.ReadFull(r, req.body)
	return req, err
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

// send is one webhook with a fresh connection; it returns status and body.
func send(t testing.TB, method, url, body string, headers ...string) (status int, answer string, header http.Header) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	transport := &http.Transport{DisableKeepAlives: true, DisableCompression: true}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b), resp.Header
}

// raw writes request bytes to addr and reads the answer to the end of the
// connection, or, with keep-alive connections, until nothing more comes.
func raw(t testing.TB, addr, request string) string {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(conn) // a reset after the answer is an end too
	return string(b)
}

// TestMainPath is the README's transcript: a server, a client, a target, a webhook.
func TestMainPath(t *testing.T) {
	server := startServer(t)
	target := newTarget(t, nil)
	startClient(t, server.addr, "demo", target.url)
	status, _, _ := send(t, "POST", "http://"+server.addr+"/webhooks/demo/push?x=1", `{"hello":"world"}`, "Content-Type", "application/json")
	if status != 200 {
		t.Fatalf("status %d, want 200", status)
	}
	got := target.next(t)
	if got.line != "POST /webhooks/demo/push?x=1 HTTP/1.1" || string(got.body) != `{"hello":"world"}` {
		t.Fatalf("target got %q with %q", got.line, got.body)
	}
}
