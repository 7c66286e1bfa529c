package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/gomodule/redigo/redis"
)

// redisServer is a redis-server process of one test's own.
type redisServer struct {
	t         testing.TB
	addr, url string // url is what REDIS_URL is set to
	binary    string
	args      []string
	cmd       *exec.Cmd     // nil while stopped
	ended     chan struct{} // closed when cmd has ended
	out       *logBuffer
}

// startRedis starts a redis-server on a free port until the test ends. args
// may move it to another kind of port: %d in them stands for its number.
func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	binary := need(t, "redis-server", "redis-server")
	port := freePorts(t, 1)[0]
	r := &redisServer{
		t: t, binary: binary, addr: fmt.Sprintf("127.0.0.1:%d", port), url: fmt.Sprintf("redis://127.0.0.1:%d", port),
		args: []string{
			"--bind", "127.0.0.1", "--port", strconv.Itoa(port), "--dir", t.TempDir(),
			"--save", "", "--appendonly", "no", "--daemonize", "no",
		},
	}
	for _, arg := range args {
		r.args = append(r.args, strings.ReplaceAll(arg, "%d", strconv.Itoa(port)))
	}
	t.Cleanup(r.stop)
	r.restart()
	return r
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

// restart starts the process on the same port and waits until it takes connections.
func (r *redisServer) restart() {
	r.t.Helper()
	r.stop()
	r.out, r.ended = &logBuffer{}, make(chan struct{})
	r.cmd = exec.Command(r.binary, r.args...)
	r.cmd.Stdout, r.cmd.Stderr = r.out, r.out
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	go func(cmd *exec.Cmd, ended chan struct{}) {
		cmd.Wait()
		close(ended)
	}(r.cmd, r.ended)
	eventually(r.t, "redis-server takes connections", func() bool {
		select {
		case <-r.ended:
			r.t.Fatalf("redis-server ended:\n%s", r.out)
		default:
		}
		conn, err := net.Dial("tcp", r.addr)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// stop kills the process at once, frozen or not: nothing is said any more.
func (r *redisServer) stop() {
	if r.cmd == nil {
		return
	}
	r.cmd.Process.Kill()
	<-r.ended
	r.cmd = nil
}

// end asks the process to end, as an operator does: what it has answered to a
// publisher it has also written to the subscribers.
func (r *redisServer) end() {
	r.cmd.Process.Signal(syscall.SIGTERM)
	<-r.ended
	r.cmd = nil
}

// freeze leaves the process in a state in which the kernel accepts for it and
// nobody answers.
func (r *redisServer) freeze() { r.cmd.Process.Signal(syscall.SIGSTOP) }
func (r *redisServer) thaw()   { r.cmd.Process.Signal(syscall.SIGCONT) }

func (r *redisServer) cli(cmd string, args ...any) any {
	r.t.Helper()
	conn, err := redis.DialURL(r.url)
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close()
	reply, err := conn.Do(cmd, args...)
	if err != nil {
		r.t.Fatalf("%s: %v", cmd, err)
	}
	return reply
}

// channels is what PUBSUB CHANNELS says, sorted.
func (r *redisServer) channels() []string {
	r.t.Helper()
	names, _ := redis.Strings(r.cli("PUBSUB", "CHANNELS", "*"), nil)
	slices.Sort(names)
	return names
}

// subscriptions is how many connections are subscribed to a Redis channel.
func (r *redisServer) subscriptions(name string) int {
	r.t.Helper()
	counts, _ := redis.Values(r.cli("PUBSUB", "NUMSUB", name), nil)
	n, err := redis.Int(counts[1], nil)
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// startOver starts a server whose bus is the Redis at url.
func startOver(t testing.TB, url string, env ...string) *program {
	t.Helper()
	return startServer(t, append(append(probed, "REDIS_URL="+url), env...)...)
}

// startReplicas starts two servers that are one relay over r.
func startReplicas(t testing.TB, r *redisServer, env ...string) (a, b *program) {
	t.Helper()
	env = append([]string{"HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT=2s"}, env...)
	a, b = startOver(t, r.url, env...), startOver(t, r.url, env...)
	awaitReady(t, a, b)
	return a, b
}

// awaitReady waits until all of programs say that they are.
func awaitReady(t testing.TB, programs ...*program) {
	t.Helper()
	for _, p := range programs {
		eventually(t, "/ready is 200", func() bool { return probeStatus(t, p, "/ready") == 200 })
	}
}

// probeStatus is the status of one of the health service's pages.
func probeStatus(t testing.TB, p *program, path string) int {
	t.Helper()
	status, _, _ := send(t, "GET", "http://"+p.health+path, "")
	return status
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

func webhookURL(p *program, channel, tail string) string {
	return "http://" + p.addr + "/webhooks/" + channel + "/" + tail
}

// postAccepted posts one webhook that must be accepted.
func postAccepted(t testing.TB, p *program, channel, tail string) {
	t.Helper()
	if err := accepted(p, channel, tail); err != nil {
		t.Fatal(err)
	}
}

// accepted is postAccepted for any goroutine.
func accepted(p *program, channel, tail string) error {
	o := post(context.Background(), afresh, "POST", webhookURL(p, channel, tail), "{}")
	if o.err != nil || o.status != 200 {
		return fmt.Errorf("webhook %s: status %d %s %v, want 200", tail, o.status, o.body, o.err)
	}
	return nil
}

// subscribeAt opens a stream at p, as subscribe does, on a connection of its own.
func subscribeAt(ctx context.Context, p *program, channel string, headers ...string) *listener {
	return subscribe(ctx, &http.Transport{DisableKeepAlives: true}, "http://"+p.addr+"/subscribe/"+channel+"/", headers...)
}

// openFeed subscribes and waits for ready; the stream ends with the test.
func openFeed(t testing.TB, p *program, channel string, headers ...string) *listener {
	t.Helper()
	l := subscribeAt(context.Background(), p, channel, headers...)
	t.Cleanup(l.leave)
	if err := l.becomesReady(); err != nil {
		t.Fatal(err)
	}
	return l
}

// tcpLink is a TCP proxy in front of a server: a network that a test can break.
type tcpLink struct {
	listener net.Listener
	tried    atomic.Int64 // connections that came
	sent     atomic.Int64 // bytes that went to the server

	mu      sync.Mutex
	changed *sync.Cond // of what follows
	to      string     // "": nobody answers
	conns   map[net.Conn]bool
	most    int  // bytes that each connection may send to the server; below 0: all
	silent  bool // nothing comes from the server
}

func newLink(t testing.TB, to string) *tcpLink {
	t.Helper()
	listener := loopback(t)
	l := &tcpLink{listener: listener, to: to, conns: map[net.Conn]bool{}, most: -1}
	l.changed = sync.NewCond(&l.mu)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			l.tried.Add(1)
			far, err := l.connect(near)
			if err != nil {
				near.Close()
				continue
			}
			wg.Go(func() { l.pass(far, near, true) })
			wg.Go(func() { l.pass(near, far, false) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		l.route("")
		wg.Wait()
	})
	return l
}

// pass copies from src to dst while that is allowed, and closes both at the end.
func (l *tcpLink) pass(dst, src net.Conn, toServer bool) {
	defer dst.Close()
	defer src.Close()
	buf := make([]byte, 32<<10)
	for total := 0; ; {
		n, err := src.Read(buf)
		for rest := buf[:n]; len(rest) > 0; {
			k := l.admit(src, toServer, total, len(rest))
			if k == 0 {
				return
			}
			if _, err := dst.Write(rest[:k]); err != nil {
				return
			}
			rest, total = rest[k:], total+k
			if toServer {
				l.sent.Add(int64(k))
			}
		}
		if err != nil {
			if !toServer {
				l.admit(src, false, total, 1) // an end is silent too
			}
			return
		}
	}
}

// admit waits until some of n bytes may pass and returns how many; none when
// the connection is cut.
func (l *tcpLink) admit(src net.Conn, toServer bool, total, n int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.conns[src] {
		switch {
		case toServer && l.most >= 0:
			if k := min(n, l.most-total); k > 0 {
				return k
			}
		case toServer || !l.silent:
			return n
		}
		l.changed.Wait()
	}
	return 0
}

// set changes what admit looks at.
func (l *tcpLink) set(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
	l.changed.Broadcast()
}

func (l *tcpLink) limit(most int) { l.set(func() { l.most = most }) }
func (l *tcpLink) silence()       { l.set(func() { l.silent = true }) }
func (l *tcpLink) speak()         { l.set(func() { l.silent = false }) }

// connect dials for one accepted connection, and remembers both.
func (l *tcpLink) connect(near net.Conn) (far net.Conn, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.to == "" {
		return nil, errors.New("cut")
	}
	if far, err = net.Dial("tcp", l.to); err == nil {
		l.conns[near], l.conns[far] = true, true
	}
	return far, err
}

// route cuts every connection and sends new ones to another address, or, when
// that is empty, nowhere.
func (l *tcpLink) route(to string) {
	l.set(func() {
		l.to = to
		for conn := range l.conns {
			conn.Close()
		}
		clear(l.conns)
	})
}

func (l *tcpLink) addr() string { return l.listener.Addr().String() }

// retrySender posts numbered webhooks as providers do: over connections that stay
// open, and again only after 503 or a connection that was refused.
type retrySender struct {
	t         testing.TB
	urls      []string // in turn
	body      string
	transport *http.Transport
	turn      atomic.Int64
	retried   atomic.Int64
	failed    atomic.Int64 // answered neither 200 nor 503
	slowest   atomic.Int64 // nanoseconds of one request
	mu        sync.Mutex
	taken     map[string]bool // guarded by mu: by number
}

func newSender(t testing.TB, urls ...string) *retrySender {
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	t.Cleanup(transport.CloseIdleConnections)
	return &retrySender{t: t, urls: urls, body: "{}", transport: transport, taken: map[string]bool{}}
}

// once is one try: ok when the webhook was accepted, again when it may be repeated.
func (s *retrySender) once(number string) (ok, again bool) {
	began := time.Now()
	o := post(context.Background(), s.transport, "POST", s.urls[int(s.turn.Add(1))%len(s.urls)]+number, s.body, "Content-Type", "application/json")
	for took := int64(time.Since(began)); ; {
		if old := s.slowest.Load(); took <= old || s.slowest.CompareAndSwap(old, took) {
			break
		}
	}
	if errors.Is(o.err, syscall.ECONNREFUSED) {
		return false, true
	}
	if o.status != 200 && o.status != 503 {
		s.t.Logf("webhook %s: status %d %v", number, o.status, o.err)
	}
	return o.status == 200, o.status == 503
}

// post repeats one webhook until it is accepted or ctx ends.
func (s *retrySender) post(ctx context.Context, number string) {
	for ctx.Err() == nil {
		ok, again := s.once(number)
		if ok {
			s.mu.Lock()
			s.taken[number] = true
			s.mu.Unlock()
			return
		}
		if !again {
			s.failed.Add(1)
			return
		}
		s.retried.Add(1)
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// run posts one webhook every interval until stop is called, which waits for
// the last one.
func (s *retrySender) run(interval time.Duration) (stop func()) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	var posts sync.WaitGroup
	end := make(chan struct{})
	posts.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-end:
				return
			case <-tick.C:
				posts.Go(func() { s.post(ctx, strconv.Itoa(i)) })
			}
		}
	})
	return func() {
		close(end)
		posts.Wait()
		cancel()
	}
}

// arrivals counts arrivals by number: the end of a webhook's path.
type arrivals struct {
	mu   sync.Mutex
	seen map[string]int
}

func (c *arrivals) note(path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen == nil {
		c.seen = map[string]int{}
	}
	c.seen[path[strings.LastIndexByte(path, '/')+1:]]++
}

// count is how many different numbers arrived.
func (c *arrivals) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.seen)
}

func (c *arrivals) target(t testing.TB) *target {
	return newTarget(t, func(r recorded) string {
		c.note(strings.Fields(r.line)[1])
		return ok200
	})
}

// more waits for n more.
func (c *arrivals) more(t testing.TB, n int) {
	t.Helper()
	enough := c.count() + n
	eventually(t, "webhooks come through", func() bool { return c.count() >= enough })
}

// compare tells what of taken did not arrive, and what arrived more than once.
func (c *arrivals) compare(taken map[string]bool) (lost, repeated []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for number := range taken {
		if c.seen[number] == 0 {
			lost = append(lost, number)
		}
	}
	for number, n := range c.seen {
		if n > 1 {
			repeated = append(repeated, number)
		}
	}
	return lost, repeated
}

// check waits for everything that was accepted and demands it exactly once.
func (c *arrivals) check(t testing.TB, s *retrySender) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	var lost, repeated []string
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if lost, repeated = c.compare(s.taken); len(lost) == 0 {
			break
		}
	}
	t.Logf("accepted %d, repeated by the sender %d, slowest answer %s; lost %d, duplicated %d",
		len(s.taken), s.retried.Load(), time.Duration(s.slowest.Load()).Round(time.Millisecond), len(lost), len(repeated))
	if len(s.taken) == 0 || len(lost) > 0 || len(repeated) > 0 || s.failed.Load() > 0 {
		t.Errorf("lost %v, duplicated %v, failed %d", lost, repeated, s.failed.Load())
	}
}

// TestReplicasShareEvents is the promise of ready: a webhook accepted by any
// replica afterwards is on the stream, and once.
func TestReplicasShareEvents(t *testing.T) {
	t.Parallel()
	a, b := startReplicas(t, startRedis(t))
	replicas := []*program{a, b}
	var feeds [100]*listener
	channel := func(i int) string { return fmt.Sprintf("fresh-%d", i) }
	for i := range feeds {
		feeds[i] = openFeed(t, replicas[i%2], channel(i))
		postAccepted(t, replicas[1-i%2], channel(i), "first")
	}
	for i, f := range feeds {
		f.only(t, "first")
		postAccepted(t, replicas[i%2], channel(i), "last") // a second copy would come before it
		f.only(t, "last")
	}
}

// TestRedisHoldsOnlySubscriptions looks at what a relay leaves in Redis: one
// channel for each that is live, and no key.
func TestRedisHoldsOnlySubscriptions(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	a, b := startReplicas(t, r, "RESPONSE_MODE=accept, held=status", "RESPONSE_TIMEOUT=9s, held=50")
	own := r.channels()
	if len(own) != 3 || !strings.HasPrefix(own[0], "webhook-relay:@") || !slices.Contains(own, "webhook-relay:@all") {
		t.Fatalf("channels of two idle replicas: %v", own)
	}
	live := func(names ...string) []string {
		for i, name := range names {
			names[i] = "webhook-relay:" + name
		}
		return slices.Sorted(slices.Values(append(names, own...)))
	}
	awaitChannels := func(what string, want []string) {
		t.Helper()
		eventually(t, what, func() bool { return slices.Equal(r.channels(), want) })
	}
	first, second, other := openFeed(t, a, "one"), openFeed(t, a, "one"), openFeed(t, b, "two")
	third := openFeed(t, b, "one")
	awaitChannels("two live channels", live("one", "two"))
	if n := r.subscriptions("webhook-relay:one"); n != 2 {
		t.Errorf("%d subscriptions for a channel with streams at two replicas", n)
	}
	for _, channel := range []string{"one", "two", "nobody"} {
		postAccepted(t, a, channel, "x")
	}
	if status, _, _ := send(t, "POST", webhookURL(b, "held", "x"), "{}"); status != 503 {
		t.Errorf("held for nobody: status %d", status)
	}
	first.leave()
	awaitChannels("one stream of three left", live("one", "two"))
	second.leave()
	eventually(t, "a replica without streams leaves the channel", func() bool { return r.subscriptions("webhook-relay:one") == 1 })
	third.leave()
	awaitChannels("the channel's last stream left", live("two"))
	other.leave()
	awaitChannels("all streams left", own)

	if n := r.cli("DBSIZE"); n != int64(0) {
		t.Errorf("%v keys", n)
	}
	// Not even for a moment: the commands that were used can store nothing.
	stats, _ := redis.String(r.cli("INFO", "commandstats"), nil)
	for line := range strings.Lines(stats) {
		command, _, _ := strings.Cut(strings.TrimPrefix(line, "cmdstat_"), ":")
		switch strings.TrimSpace(command) {
		case "subscribe", "unsubscribe", "publish", "ping", "role", "pubsub|numsub", "pubsub|channels", "dbsize", "info", "", "# Commandstats":
		default:
			t.Errorf("command %q was used", command)
		}
	}
}

// TestHalfClosedSender: a sender may close its side after the request; what is
// published is accepted.
func TestHalfClosedSender(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	server := startOver(t, r.url)
	awaitReady(t, server)
	for range 20 {
		if answer := exchange(t, server.addr, "POST /webhooks/ci/x HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}"); !strings.HasPrefix(answer, "HTTP/1.0 200") {
			t.Fatalf("got %q", answer)
		}
	}
}

// TestRedisChannelPrefix has two relays on one Redis that must not hear each
// other, also where prefix and channel make the same name in Redis.
func TestRedisChannelPrefix(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	a, b := startReplicas(t, r)
	other, _ := startReplicas(t, r, "REDIS_CHANNEL_PREFIX=other.")
	here, there := openFeed(t, a, "same"), openFeed(t, other, "same")
	if !slices.Contains(r.channels(), "other.same") {
		t.Errorf("channels: %v", r.channels())
	}
	for range 20 {
		postAccepted(t, b, "same", "here")
		postAccepted(t, other, "same", "there")
		here.only(t, "here")
		there.only(t, "there")
	}
	one, _ := startReplicas(t, r, "REDIS_CHANNEL_PREFIX=relay")
	two, _ := startReplicas(t, r, "REDIS_CHANNEL_PREFIX=relay-dev")
	ofOne, ofTwo := openFeed(t, one, "-devci"), openFeed(t, two, "ci")
	if n := r.subscriptions("relay-devci"); n != 2 {
		t.Errorf("%d subscriptions, want the two relays'", n)
	}
	for range 20 {
		postAccepted(t, one, "-devci", "one")
		postAccepted(t, two, "ci", "two")
		ofOne.only(t, "one")
		ofTwo.only(t, "two")
	}
}

// TestSubscriptionEdges has many streams come and go on few channels, so that
// subscribing and unsubscribing overtake each other, and then compares what
// Redis believes with who is there.
func TestSubscriptionEdges(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	a, b := startReplicas(t, r)
	replicas := []*program{a, b}
	comeAndGo := func(worker, round int) error {
		near, far := replicas[worker%2], replicas[1-worker%2]
		channel := fmt.Sprintf("edge-%d", (worker/2+round)%3)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		if round%3 == 0 { // leave at any moment, also before ready
			time.AfterFunc(time.Duration(mathrand.IntN(3000))*time.Microsecond, cancel)
		}
		f := subscribeAt(ctx, near, channel)
		defer f.leave()
		if round%3 == 0 {
			return nil
		}
		if err := f.becomesReady(); err != nil {
			return fmt.Errorf("%s: %v", channel, err)
		}
		mark := fmt.Sprintf("%d.%d", worker, round)
		if err := accepted(far, channel, mark); err != nil {
			return err
		}
		for { // the others' come too
			if w, err := f.await(); err != nil || strings.HasSuffix(w.Path, "/"+mark) {
				return err
			}
		}
	}
	var wg sync.WaitGroup
	for worker := range 16 {
		wg.Go(func() {
			for round := range 25 {
				if err := comeAndGo(worker, round); err != nil {
					t.Errorf("stream %d of worker %d: %v", round, worker, err)
					return
				}
			}
		})
	}
	wg.Wait()
	// Who stays: both replicas, one of them, nobody.
	feeds := map[string][]*listener{
		"edge-0": {openFeed(t, a, "edge-0"), openFeed(t, b, "edge-0")},
		"edge-1": {openFeed(t, b, "edge-1"), openFeed(t, b, "edge-1")},
	}
	for channel, want := range map[string]int{"edge-0": 2, "edge-1": 1, "edge-2": 0} {
		eventually(t, fmt.Sprintf("%s has %d subscriptions", channel, want), func() bool {
			return r.subscriptions("webhook-relay:"+channel) == want
		})
		for i, p := range replicas {
			postAccepted(t, p, channel, strconv.Itoa(i))
			for _, f := range feeds[channel] {
				f.only(t, strconv.Itoa(i))
			}
		}
	}
	if n := len(r.channels()); n != 5 { // and the replicas' own three
		t.Errorf("channels: %v", r.channels())
	}
}

// heapInUse is how much is in use after a collection.
func heapInUse() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// postRefused posts one webhook that must be refused in time with 503 and Retry-After.
func postRefused(t testing.TB, p *program, channel string) {
	t.Helper()
	began := time.Now()
	status, body, header := send(t, "POST", webhookURL(p, channel, "x"), "{}")
	if status != 503 || header.Get("Retry-After") == "" || !strings.Contains(body, `"statusCode":503`) {
		t.Fatalf("status %d %s %v, want 503 with Retry-After", status, body, header)
	}
	if took := time.Since(began); took > busTimeout+silenceTimeout+slack {
		t.Errorf("refused after %s", took)
	}
}

// TestRefusedIsForgotten: webhooks that a broken bus refuses are refused in its
// time, and nothing of them stays.
func TestRefusedIsForgotten(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		p := newPipes()
		newRigOn(t, p, func(h *Hub) Bus {
			return NewRedisBus(busOptions("127.0.0.1:1"), testReplica, h, slog.New(slog.DiscardHandler)) // which nobody runs
		})
		rt := p.transport(t, false)
		rt.MaxIdleConnsPerHost = 100
		payload := strings.Repeat("x", 32<<10)
		flood := func(n int) {
			var senders sync.WaitGroup
			for range 100 {
				senders.Go(func() {
					for range n / 100 {
						began := time.Now()
						if got := post(t.Context(), rt, "POST", hooksURL, payload); got.status != 503 || time.Since(began) != busTimeout {
							t.Errorf("status %d %v after %s, want 503 after %s", got.status, got.err, time.Since(began), busTimeout)
						}
					}
				})
			}
			senders.Wait()
		}
		flood(100) // connections and pools have their size then
		before := heapInUse()
		flood(300)
		if grown := heapInUse() - before; grown > 4<<20 {
			t.Errorf("heap grew by %d bytes over 300 refused webhooks of %d", grown, len(payload))
		}
	})
}

// TestRedisDown kills Redis under a server with a stream, and brings it back.
func TestRedisDown(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	server := startOver(t, r.url, "SERVER_HEARTBEAT_INTERVAL=100", "LOG_LEVEL=info")
	awaitReady(t, server)
	f := openFeed(t, server, "down")
	postAccepted(t, server, "down", "before")
	f.only(t, "before")

	r.stop()
	postRefused(t, server, "down")
	eventually(t, "/ready is 503", func() bool { return probeStatus(t, server, "/ready") == 503 })
	if got := probeStatus(t, server, "/live"); got != 200 {
		t.Errorf("/live is %d", got)
	}
	server.wait("redis is down")
	logged := len(server.log.String())
	postRefused(t, server, "down")
	for line := range strings.Lines(server.log.String()[logged:]) {
		if !strings.Contains(line, `"msg":"webhook refused"`) {
			t.Errorf("logged while down: %s", line)
		}
	}
	beats := len(f.got("heartbeat"))
	eventually(t, "heartbeats go on", func() bool { return len(f.got("heartbeat")) > beats+2 })
	late := make(chan *listener, 1)
	go func() { late <- subscribeAt(t.Context(), server, "down") }() // waits for the bus

	r.restart()
	awaitReady(t, server)
	newcomer := <-late
	defer newcomer.leave()
	if err := newcomer.becomesReady(); err != nil {
		t.Errorf("stream opened while down: %v", err)
	}
	postAccepted(t, server, "down", "after")
	f.only(t, "after")
	newcomer.only(t, "after")
	if n := len(f.got("ready")); n != 1 {
		t.Errorf("%d ready events on one stream", n)
	}
	if down, up := len(server.log.lines("redis is down")), len(server.log.lines("redis is connected")); down != 1 || up != 2 {
		t.Errorf("logged down %d times, want 1; connected %d times, want 2", down, up)
	}
}

// TestRedisDownAtStart starts a server before its Redis.
func TestRedisDownAtStart(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	r.stop()
	server := startOver(t, r.url, "LOG_LEVEL=info")
	postRefused(t, server, "early")
	if ready, live := probeStatus(t, server, "/ready"), probeStatus(t, server, "/live"); ready != 503 || live != 200 {
		t.Errorf("/ready is %d, want 503; /live is %d, want 200", ready, live)
	}
	status, _, header := send(t, "GET", "http://"+server.addr+"/subscribe/early/", "")
	if status != 503 || header.Get("Retry-After") == "" {
		t.Errorf("stream without a bus: status %d, want 503 with Retry-After", status)
	}
	r.restart()
	awaitReady(t, server)
	f := openFeed(t, server, "early")
	postAccepted(t, server, "early", "x")
	f.only(t, "x")
	if n := len(server.log.lines("redis is down")); n != 1 {
		t.Errorf("logged %d times that redis is down", n)
	}
}

// TestRedisReconnectAttempts bounds the tries, at the start and later.
func TestRedisReconnectAttempts(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	server := startServer(t, "REDIS_URL="+r.url, "REDIS_MAX_RECONNECT_ATTEMPTS=2",
		"REDIS_RECONNECT_BACKOFF_INITIAL_TIMEOUT=10", "LOG_LEVEL=debug")
	server.wait("redis is connected")
	select {
	case <-server.done:
		t.Fatal("server ended with a working bus")
	default:
	}
	r.stop()
	select {
	case <-server.done:
	case <-time.After(patience):
		t.Fatal("server did not end")
	}
	if server.err == nil || !strings.Contains(server.err.Error(), "connect to redis 3 times") {
		t.Errorf("run returned %v", server.err)
	}
}

// TestRedisBackoff counts tries to connect, each of which may open all of a
// session's connections. The pauses between them are those of the variables,
// also when sessions come up and break at once.
func TestRedisBackoff(t *testing.T) {
	t.Parallel()
	const tries = 12                                             // which without a longest pause would take longer than patience
	const pauses = (50 + 100 + (tries-3)*200) * time.Millisecond // between so many
	for _, tt := range []struct {
		name  string
		begin func(*redisServer, *tcpLink)
		up    func(*redisServer, *tcpLink) // whenever a session has come up
	}{
		{"connections close at once", func(_ *redisServer, way *tcpLink) { way.route("") }, nil},
		{"connections are refused", func(_ *redisServer, way *tcpLink) { way.listener.Close() }, nil},
		{"sessions break at once", nil, func(r *redisServer, way *tcpLink) { way.route(r.addr) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := startRedis(t)
			way := newLink(t, r.addr)
			if tt.begin != nil {
				tt.begin(r, way)
			}
			began := time.Now()
			server := startServer(t, "REDIS_URL=redis://"+way.addr(), "REDIS_RECONNECT_BACKOFF_INITIAL_TIMEOUT=50",
				"REDIS_RECONNECT_BACKOFF_MAX_TIMEOUT=200ms", "REDIS_RECONNECT_BACKOFF_RANDOMIZE=false")
			seen := 0
			eventually(t, fmt.Sprintf("%d tries", tries), func() bool {
				if up := len(server.log.lines("redis is connected")); up > seen {
					seen = up
					tt.up(r, way)
				}
				refused := len(server.log.lines("redis is down")) + len(server.log.lines("redis is still down"))
				return way.tried.Load() > (tries-1)*2 || tt.up == nil && refused >= tries
			})
			if took := time.Since(began); took < pauses {
				t.Errorf("%d tries took %s, want %s", tries, took, pauses)
			}
		})
	}
}

// TestRedisFrozen stops the process without closing anything: Redis accepts
// and never answers.
func TestRedisFrozen(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	server := startOver(t, r.url, "LOG_LEVEL=info")
	awaitReady(t, server)
	f := openFeed(t, server, "frozen")
	working := func(tail string) {
		t.Helper()
		awaitReady(t, server)
		// What was sent to the frozen Redis may come first: it was refused, but
		// nobody can take it back.
		postAccepted(t, server, "frozen", tail)
		for !strings.HasSuffix(f.webhook(t).Path, "/"+tail) {
		}
	}
	working("1")

	r.freeze()
	postRefused(t, server, "frozen") // once it is written, nobody could say otherwise
	postRefused(t, server, "frozen")
	if got := probeStatus(t, server, "/ready"); got != 503 {
		t.Errorf("/ready is %d", got)
	}
	r.thaw()
	working("2")

	r.freeze() // and now nobody posts
	began := time.Now()
	eventually(t, "/ready is 503", func() bool { return probeStatus(t, server, "/ready") == 503 })
	if took := time.Since(began); took > silenceTimeout+slack {
		t.Errorf("noticed after %s", took)
	}
	if got := probeStatus(t, server, "/live"); got != 200 {
		t.Errorf("/live is %d", got)
	}
	eventually(t, "the connections count as broken", func() bool { return len(server.log.lines("redis is down")) == 2 })
	r.thaw()
	working("3")
	if n := len(f.got("ready")); n != 1 {
		t.Errorf("%d ready events on one stream", n)
	}
	if down, up := len(server.log.lines("redis is down")), len(server.log.lines("redis is connected")); down != 2 || up != 3 {
		t.Errorf("logged down %d times, want 2; connected %d times, want 3", down, up)
	}
}

// TestRedisTLS uses everything that REDIS_URL can hold.
func TestRedisTLS(t *testing.T) {
	t.Parallel()
	dir, ca := t.TempDir(), newAuthority(t, nil)
	caFile, certFile, keyFile := filepath.Join(dir, "ca"), filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	replace(t, caFile, ca.pem)
	writePair(t, certFile, keyFile, ca.pair(t, func(c *x509.Certificate) { c.ExtKeyUsage, c.IPAddresses = nil, []net.IP{net.IPv4(127, 0, 0, 1)} }))
	const password = "s3cret:/@?#%"
	r := startRedis(t, "--port", "0", "--tls-port", "%d", "--tls-auth-clients", "no",
		"--tls-cert-file", certFile, "--tls-key-file", keyFile, "--tls-ca-cert-file", caFile,
		"--user", "default", "off",
		"--user", "relay", "on", ">"+password, "resetchannels", "&webhook-relay:*", "+@pubsub", "+ping", "+select")
	secret := url.UserPassword("relay", password)
	start := func(user *url.Userinfo, env ...string) *program {
		u := url.URL{Scheme: "rediss", User: user, Host: r.addr, Path: "/3"}
		return startOver(t, u.String(), env...)
	}
	a, b := start(secret, "CA_FILE="+caFile), start(secret, "CA_FILE="+caFile)
	awaitReady(t, a, b)
	f := openFeed(t, a, "sealed")
	postAccepted(t, b, "sealed", "x")
	f.only(t, "x")

	const wrong = "wr0ng-password"
	for name, p := range map[string]*program{
		"wrong password": start(url.UserPassword("relay", wrong), "CA_FILE="+caFile),
		"wrong user":     start(url.UserPassword("nobody", wrong), "CA_FILE="+caFile),
		"unknown CA":     start(secret),
	} {
		p.wait("redis is down")
		if got := probeStatus(t, p, "/ready"); got != 503 {
			t.Errorf("%s: /ready is %d", name, got)
		}
		postRefused(t, p, "sealed")
		if p.stop() != nil {
			t.Errorf("%s: run returned %v", name, p.err)
		}
		for _, clear := range []string{wrong, password, url.QueryEscape(password), url.PathEscape(password), secret.String()} {
			if strings.Contains(p.log.String(), clear) {
				t.Errorf("%s: the log holds a password:\n%s", name, p.log)
			}
		}
	}
	for _, p := range []*program{a, b} {
		if log := p.log.String(); strings.Contains(log, "s3cret") {
			t.Errorf("the log holds the password:\n%s", log)
		}
	}
}

// TestRedisRestartUnderLoad takes Redis away while webhooks come in at both
// replicas and are wanted at both. Webhooks that were answered 200 must
// arrive; those that were answered 503 may have, and are sent again. A Redis
// that is killed may have answered a publisher and not yet written to the
// subscribers: that instant is all that accept mode may lose.
func TestRedisRestartUnderLoad(t *testing.T) {
	t.Parallel()
	for _, kind := range []struct {
		name string
		away func(*redisServer)
		lose int
	}{{"Redis ends", (*redisServer).end, 0}, {"Redis is killed", (*redisServer).stop, 3}} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			r := startRedis(t)
			a, b := startReplicas(t, r, "LOG_LEVEL=info")
			var atTarget, atFeed arrivals
			startClient(t, a.addr, "load", atTarget.target(t).url)
			f := openFeed(t, b, "load")
			posts := newSender(t, webhookURL(a, "load", ""), webhookURL(b, "load", ""))
			stop := posts.run(2 * time.Millisecond)
			arrived := func(n int) bool {
				for w, err := f.take(); w != nil || err != nil; w, err = f.take() {
					if err != nil {
						t.Fatal(err)
					}
					atFeed.note(w.Path)
				}
				return min(atFeed.count(), atTarget.count()) >= n
			}
			eventually(t, "webhooks come through", func() bool { return arrived(300) })
			kind.away(r)
			eventually(t, "senders notice", func() bool { return posts.retried.Load() > 20 })
			r.restart()
			again := atFeed.count() + 300
			eventually(t, "webhooks come through again", func() bool { return arrived(again) })
			stop()
			for name, at := range map[string]*arrivals{"target": &atTarget, "other replica's stream": &atFeed} {
				eventually(t, "what was accepted reaches the "+name, func() bool {
					arrived(0)
					lost, _ := at.compare(posts.taken)
					return len(lost) <= kind.lose
				})
			}
			_, repeated := atTarget.compare(posts.taken)
			slowest := time.Duration(posts.slowest.Load())
			t.Logf("accepted %d, refused and sent again %d, of these delivered twice %d, slowest answer %s",
				len(posts.taken), posts.retried.Load(), len(repeated), slowest.Round(time.Millisecond))
			if slowest > busTimeout+silenceTimeout+slack { // nobody may hang
				t.Errorf("slowest answer took %s", slowest)
			}
			if n := posts.failed.Load(); n > 0 {
				t.Errorf("%d webhooks were answered neither 200 nor 503", n)
			}
		})
	}
}

// TestClientRestartUnderLoad restarts the client twice while senders wait for
// the target's status at both replicas. Each sender gets it at the first try, and
// a client that may finish what it has leaves nothing to be forwarded twice.
func TestClientRestartUnderLoad(t *testing.T) {
	t.Parallel()
	for _, kind := range []struct {
		name   string
		signal os.Signal
	}{{"client ends", syscall.SIGTERM}, {"client is killed", os.Kill}} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			a, b := startReplicas(t, startRedis(t), "RESPONSE_MODE=status", "RESPONSE_TIMEOUT=30s", "LOG_LEVEL=info")
			var atTarget arrivals
			tg := newTarget(t, func(r recorded) string {
				atTarget.note(strings.Fields(r.line)[1])
				<-time.After(10 * time.Millisecond) // so that some are always under way
				return ok200
			})
			start := func(p *program) *process {
				c := launch(t, []string{
					"RELAY_MODE=client", "SOURCE_URL=http://" + p.addr + "/subscribe/load/", "TARGET_BASE_URL=" + tg.url, "LOG_LEVEL=info",
				})
				c.logged(t, "stream ready")
				return c
			}
			client := start(a)
			posts := newSender(t, webhookURL(a, "load", ""), webhookURL(b, "load", ""))
			stop := posts.run(5 * time.Millisecond)
			for _, next := range []*program{b, a} {
				atTarget.more(t, 100)
				client.cmd.Process.Signal(kind.signal)
				if code := client.code(t); kind.signal == syscall.SIGTERM && code != 0 {
					t.Errorf("the client exited with %d", code)
				}
				eventually(t, "requests wait at both replicas", func() bool {
					return min(metricOf(t, a, "relay_held_webhooks"), metricOf(t, b, "relay_held_webhooks")) >= 5
				})
				client = start(next)
			}
			atTarget.more(t, 100)
			stop()
			lost, repeated := atTarget.compare(posts.taken)
			t.Logf("answered %d, repeated by the sender %d, slowest answer %s; lost %d, duplicated %d",
				len(posts.taken), posts.retried.Load(), time.Duration(posts.slowest.Load()).Round(time.Millisecond), len(lost), len(repeated))
			if len(posts.taken) < 300 || len(lost) > 0 || posts.failed.Load()+posts.retried.Load() > 0 || kind.signal == syscall.SIGTERM && len(repeated) > 0 {
				t.Errorf("lost %v, duplicated %v, failed %d, refused %d", lost, repeated, posts.failed.Load(), posts.retried.Load())
			}
		})
	}
}

// TestTargetRestartUnderLoad kills the target twice while accepted webhooks
// come in at both replicas. The client forwards each until it is answered; what
// the target sees twice has the same event id.
func TestTargetRestartUnderLoad(t *testing.T) {
	t.Parallel()
	a, b := startReplicas(t, startRedis(t), "LOG_LEVEL=info")
	var atTarget, ids arrivals
	addr := fmt.Sprintf("127.0.0.1:%d", freePorts(t, 1)[0])
	start := func() *http.Server {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		web := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			<-time.After(10 * time.Millisecond) // so that some are always under way
			ids.note(r.Header.Get("X-Relay-Event-Id"))
			atTarget.note(r.URL.Path)
		})}
		serveOn(t, web, l)
		return web
	}
	web := start()
	client := startClient(t, a.addr, "load", "http://"+addr, "HEALTH_SERVICE_PORT=0", "LOG_LEVEL=info")
	posts := newSender(t, webhookURL(a, "load", ""), webhookURL(b, "load", ""))
	stop := posts.run(5 * time.Millisecond)
	for range 2 {
		atTarget.more(t, 100)
		before := metricOf(t, client, "relay_forward_retries_total")
		web.Close()
		eventually(t, "the client tries again", func() bool { return metricOf(t, client, "relay_forward_retries_total") > before+20 })
		web = start()
	}
	atTarget.more(t, 100)
	stop()
	eventually(t, "all that was accepted is there", func() bool {
		lost, _ := atTarget.compare(posts.taken)
		return len(lost) == 0
	})
	_, repeated := atTarget.compare(posts.taken)
	t.Logf("accepted %d, repeated by the sender %d, by the client %d", len(posts.taken), posts.retried.Load(), len(repeated))
	if n := atTarget.count(); n != ids.count() || n != len(posts.taken) {
		t.Errorf("%d webhooks with %d ids at the target, %d accepted", n, ids.count(), len(posts.taken))
	}
	if n := posts.failed.Load(); n > 0 {
		t.Errorf("%d webhooks were answered neither 200 nor 503", n)
	}
	if n := metricOf(t, client, `relay_forwards_total{code="unreachable"}`) + metricOf(t, client, `relay_forwards_total{code="timeout"}`); n != 0 {
		t.Errorf("the client gave %d webhooks up", n)
	}
}

// balancer spreads requests over the replicas that say they are ready, as a
// Kubernetes Service does. It repeats nothing.
type balancer struct {
	url   string
	mu    sync.Mutex
	ready map[string]bool // guarded by mu: by address
	order []string
	turn  atomic.Int64
	empty atomic.Int64 // requests while nobody was ready
}

// newBalancer looks at each replica's health port every 50 ms. replicas maps
// addresses to those of their probes.
func newBalancer(t testing.TB, replicas map[string]string) *balancer {
	l := &balancer{ready: map[string]bool{}}
	listener := loopback(t)
	l.url = "http://" + listener.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for addr, health := range replicas {
		l.order = append(l.order, addr)
		wg.Go(func() { l.watch(ctx, addr, "http://"+health+"/ready") })
	}
	slices.Sort(l.order)
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	web := &http.Server{Handler: &httputil.ReverseProxy{
		Transport: transport,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", l.pick()
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			status := http.StatusBadGateway
			if r.Context().Err() == nil && (errors.Is(err, syscall.ECONNREFUSED) || strings.Contains(err.Error(), "no Host")) {
				status = http.StatusServiceUnavailable
				l.empty.Add(1)
			}
			w.WriteHeader(status)
		},
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}}
	wg.Go(func() { web.Serve(listener) })
	t.Cleanup(func() {
		cancel()
		web.Close()
		transport.CloseIdleConnections()
		wg.Wait()
	})
	return l
}

func (l *balancer) watch(ctx context.Context, addr, ready string) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: time.Second}
	for {
		resp, err := client.Get(ready)
		if err == nil {
			resp.Body.Close()
		}
		l.mu.Lock()
		l.ready[addr] = err == nil && resp.StatusCode == 200
		l.mu.Unlock()
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// pick is the next replica that is ready, or "".
func (l *balancer) pick() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for range l.order {
		if addr := l.order[int(l.turn.Add(1))%len(l.order)]; l.ready[addr] {
			return addr
		}
	}
	return ""
}

func (l *balancer) knows(addr string, ready bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ready[addr] == ready
}

// TestRollout restarts every replica, one after the other, under load:
// the target must see each accepted webhook once.
func TestRollout(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	ports := freePorts(t, 4)
	type replica struct{ addr, health string }
	var replicas []replica
	healthOf := map[string]string{}
	for i := range 2 {
		rep := replica{fmt.Sprintf("127.0.0.1:%d", ports[2*i]), fmt.Sprintf("127.0.0.1:%d", ports[2*i+1])}
		replicas = append(replicas, rep)
		healthOf[rep.addr] = rep.health
	}
	lb := newBalancer(t, healthOf)
	rollIn := func(rep replica) *program {
		p := startServer(t, "REDIS_URL="+r.url, "LOG_LEVEL=info", "RESPONSE_MODE=accept, held=status",
			"SERVER_PORT="+rep.addr[len("127.0.0.1:"):], "HEALTH_SERVICE_PORT="+rep.health[len("127.0.0.1:"):],
			// The balancer must see a replica turn unready within the delay: what it
			// sends there afterwards is a request on a connection that is being
			// closed, or a stream that is refused.
			"HEALTH_SERVICE_SHUTDOWN_DELAY=2s", "HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT=10s")
		eventually(t, "the balancer sees a new replica", func() bool { return lb.knows(rep.addr, true) })
		return p
	}
	running := []*program{rollIn(replicas[0])} // alone, so that the streams begin there
	type side struct {
		arrivals
		client *program
		posts  *retrySender
		stop   func()
	}
	sides := map[string]*side{"accepted": {}, "held": {}}
	for channel, s := range sides {
		s.client = startClient(t, strings.TrimPrefix(lb.url, "http://"), channel, s.target(t).url, "LOG_LEVEL=info")
		s.posts = newSender(t, lb.url+"/webhooks/"+channel+"/")
	}
	running = append(running, rollIn(replicas[1]))
	sides["accepted"].stop = sides["accepted"].posts.run(5 * time.Millisecond)
	sides["held"].stop = sides["held"].posts.run(50 * time.Millisecond)
	for n := range running {
		sides["accepted"].more(t, 200)
		if err := running[n].stop(); err != nil {
			t.Errorf("replica %d: run returned %v", n, err)
		}
		eventually(t, "the balancer sees a replica go", func() bool { return lb.knows(replicas[n].addr, false) })
		running[n] = rollIn(replicas[n])
	}
	sides["accepted"].more(t, 200)
	for channel, s := range sides {
		s.stop()
		s.check(t, s.posts)
		if n := len(s.client.log.lines("stream asked to move")); n != len(running) {
			t.Errorf("%s: the client was asked to move %d times", channel, n)
		}
		if n := len(s.client.log.lines("no stream from the source")); n != 0 {
			t.Errorf("%s: %d tries to subscribe failed", channel, n)
		}
	}
	t.Logf("requests while no replica was ready: %d", lb.empty.Load())
	for _, p := range running { // at once
		p.cancel()
	}
}

// postHeld posts one webhook whose sender waits.
func postHeld(t testing.TB, p *program, channel, tail string) <-chan outcome {
	return sendHeld(t.Context(), "POST", webhookURL(p, channel, tail), "{}")
}

// sendHeld is postHeld for any webhook. The sender hangs up when ctx ends.
func sendHeld(ctx context.Context, method, url, body string, headers ...string) <-chan outcome {
	told := make(chan outcome, 1)
	go func() { // ends with the server's answer, or with ctx
		told <- post(ctx, afresh, method, url, body, headers...)
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

func awaitHeld(t testing.TB, p *program, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d requests are held", n), func() bool { return metricOf(t, p, "relay_held_webhooks") == n })
}

// gateTarget is a target that answers once it is opened.
type gateTarget struct {
	*target
	open func()
	note func(path string) // of what it answers, when set
}

func newGate(t testing.TB, answer string) *gateTarget {
	opened := make(chan struct{})
	g := &gateTarget{open: sync.OnceFunc(func() { close(opened) })}
	g.target = newTarget(t, func(r recorded) string {
		<-opened
		if g.note != nil {
			g.note(strings.Fields(r.line)[1])
		}
		return answer
	})
	t.Cleanup(g.open) // before the target waits for its connections
	return g
}

const createdAnswer = "HTTP/1.1 201 Created\r\nX-Made: yes\r\nContent-Length: 4\r\n\r\nbody"

// TestResponsesOverReplicas has the sender at one replica and who answers at
// the other.
func TestResponsesOverReplicas(t *testing.T) {
	t.Parallel()
	a, b := startReplicas(t, startRedis(t), "RESPONSE_MODE=response", "RESPONSE_TIMEOUT=2m, nobody=200")

	t.Run("client comes later", func(t *testing.T) {
		told := postHeld(t, b, "later", "x")
		awaitHeld(t, b, 1)
		startClient(t, a.addr, "later", newTarget(t, func(recorded) string { return createdAnswer }).url)
		if o := expectAnswer(t, told, 201); o.body != "body" || o.header.Get("X-Made") != "yes" {
			t.Errorf("sender got %+v", o)
		}
		awaitHeld(t, b, 0)
	})

	t.Run("client is there", func(t *testing.T) {
		startClient(t, a.addr, "there", newTarget(t, func(recorded) string { return createdAnswer }).url)
		for range 20 {
			expectAnswer(t, postHeld(t, b, "there", "x"), 201)
			expectAnswer(t, postHeld(t, a, "there", "x"), 201)
		}
	})

	t.Run("nobody comes", func(t *testing.T) {
		if o := expectAnswer(t, postHeld(t, a, "nobody", "x"), 503); o.header.Get("Retry-After") == "" {
			t.Errorf("no Retry-After: %+v", o)
		}
	})

	for name, holder := range map[string]*program{"replica it was on": a, "replica it moves to": b} {
		t.Run("stream is cut, request is held by the "+name, func(t *testing.T) {
			channel := fmt.Sprintf("cut-%d", len(name))
			way := newLink(t, a.addr)
			g := newGate(t, createdAnswer)
			client := startClient(t, way.addr(), channel, g.url)
			told := postHeld(t, holder, channel, "x")
			g.next(t)
			way.route(b.addr)
			eventually(t, "the client is on the other replica", func() bool { return len(client.log.lines("stream ready")) == 2 })
			client.wait("event is a duplicate") // it was delivered once more
			g.open()
			expectAnswer(t, told, 201)
			if n := len(g.got); n != 0 {
				t.Errorf("target saw the event %d times more", n)
			}
		})
	}

	t.Run("two clients", func(t *testing.T) {
		slow := make(chan struct{})
		free := sync.OnceFunc(func() { close(slow) })
		defer free()
		answer := func(status string) string { return "HTTP/1.1 " + status + "\r\nContent-Length: 0\r\n\r\n" }
		first := newTarget(t, func(r recorded) string {
			if strings.Contains(r.line, "/quick") {
				return ok200
			}
			return answer("500 Broken")
		})
		second := newTarget(t, func(r recorded) string {
			if strings.Contains(r.line, "/both-fail") {
				return answer("404 Not Here")
			}
			<-slow
			return answer("204 Done")
		})
		one := startClient(t, a.addr, "two", first.url, "HEALTH_SERVICE_PORT=0")
		startClient(t, b.addr, "two", second.url)
		expectAnswer(t, postHeld(t, a, "two", "both-fail"), 404) // the best of the failures
		expectAnswer(t, postHeld(t, b, "two", "both-fail"), 404)
		expectAnswer(t, postHeld(t, b, "two", "quick"), 200) // the first success, whoever still works
		told := postHeld(t, a, "two", "one-fails")
		eventually(t, "the failure is reported", func() bool { return metricOf(t, one, "relay_reports_total") == 4 })
		select {
		case o := <-told:
			t.Errorf("sender got %+v while one client still worked", o)
		default:
		}
		free()
		expectAnswer(t, told, 204)
	})

	t.Run("legacy subscriber", func(t *testing.T) {
		for i := range 30 { // such a client forwards every copy it gets
			channel := fmt.Sprintf("legacy-%d", i)
			f := openFeed(t, a, channel)
			first := postHeld(t, b, channel, "first") // while the news of the stream may still be on its way
			if o := expectAnswer(t, first, 200); o.body != "" {
				t.Errorf("sender got %+v", o)
			}
			f.only(t, "first")
			expectAnswer(t, postHeld(t, b, channel, "last"), 200)
			f.only(t, "last")
			f.leave()
		}
	})
}

// TestClientKilledOverReplicas kills a client in the midst of a forward. One at
// any replica takes over, and the sender gets its answer from any.
func TestClientKilledOverReplicas(t *testing.T) {
	t.Parallel()
	a, b := startReplicas(t, startRedis(t), "RESPONSE_MODE=response")
	for i, tt := range []struct {
		name             string
		holder, takeOver *program // the one that is killed is at a
	}{
		{"next to the killed one", b, a},
		{"next to the sender", b, b},
		{"away from both", a, b},
	} {
		t.Run(tt.name, func(t *testing.T) {
			channel := fmt.Sprintf("killed-%d", i)
			g := newGate(t, createdAnswer)
			first := launch(t, []string{"RELAY_MODE=client", "SOURCE_URL=http://" + a.addr + "/subscribe/" + channel + "/", "TARGET_BASE_URL=" + g.url})
			first.logged(t, "stream ready")
			told := postHeld(t, tt.holder, channel, "x")
			one := g.next(t)
			first.cmd.Process.Kill()
			<-first.exited
			second := newTarget(t, func(recorded) string { return says(201, "taken over") })
			startClient(t, tt.takeOver.addr, channel, second.url)
			if o := expectAnswer(t, told, 201); o.body != "taken over" {
				t.Errorf("sender got %+v", o)
			}
			two := second.next(t)
			if a, b := one.get("X-Relay-Event-Id"), two.get("X-Relay-Event-Id"); a == "" || a != b {
				t.Errorf("ids %q and %q", a, b)
			}
			if n := len(g.got) + len(second.got); n != 0 {
				t.Errorf("the targets saw the event %d times more", n)
			}
		})
	}
}

// TestShareFullOfHeld: what a channel holds may take its whole share; it reaches the
// client all the same, one after the other, and so does what was told 503 and is
// sent again.
func TestShareFullOfHeld(t *testing.T) {
	t.Parallel()
	a, b := startReplicas(t, startRedis(t), "SERVER_HELD_BUFFER=2mb")
	openFeed(t, a, "big", "X-Relay-Features", "http, respond").leave() // so that the channel is known
	eventually(t, "nobody is there", func() bool { return metricOf(t, a, "relay_subscribers") == 0 })
	body := strings.Repeat("x", 200<<10)
	sent := 0
	for _, server := range []*program{a, b, a, b, a, b, a, b, a, b, a, b} {
		if status, _, _ := send(t, "POST", webhookURL(server, "big", strconv.Itoa(sent)), body); status == 200 {
			sent++
		}
	}
	if sent < 6 {
		t.Fatalf("%d webhooks are held", sent)
	}
	target := newTarget(t, nil)
	startClient(t, a.addr, "big", target.url)
	got := map[string]bool{}
	for range sent {
		got[target.next(t).line] = true
	}
	if len(got) != sent {
		t.Errorf("%d of %d webhooks at the target", len(got), sent)
	}
	awaitHeld(t, a, 0)
	awaitHeld(t, b, 0)
}

// TestFormsOverReplicas has a reader of each form at each replica. All get what
// either replica took, as far as their form can tell it.
func TestFormsOverReplicas(t *testing.T) {
	t.Parallel()
	a, b := startReplicas(t, startRedis(t), "SERVER_MAX_PAYLOAD_SIZE_LIMIT=3mb")
	var feeds []*listener
	for _, p := range []*program{a, b} {
		feeds = append(feeds, openFeed(t, p, "ci", "X-Relay-Features", "http"), openFeed(t, p, "ci"))
	}
	bodies := payloads()
	for _, piece := range []string{"\x01", "\n", "\r", "\"", "x"} { // each of many bytes
		bodies = append(bodies, bytes.Repeat([]byte(piece), 300<<10))
	}
	for i, body := range bodies {
		p := []*program{a, b}[i%2]
		status, _, header := send(t, "PUT", webhookURL(p, "ci", "a%2Fb//c;d?x=1;y=2&sig=%zz"), string(body), "X-Latin1", everyByte[0x80:], "X-Dup", "b", "X-Dup", "a", "X-Empty", "")
		if status != 200 {
			t.Fatalf("body %d: status %d", i, status)
		}
		want := &Webhook{Method: "PUT", Path: "/webhooks/ci/a%2Fb//c;d", Query: "?x=1;y=2&sig=%zz", Body: body, Mode: modeAccept}
		for n, f := range feeds {
			got := f.webhook(t)
			if n == 0 {
				want.ID, want.Time = got.ID, got.Time
			}
			if id := header.Get("X-Relay-Event-Id"); id != "" && got.ID != id {
				t.Errorf("event %q, its sender was told %q", got.ID, id)
			}
			want.Headers = got.Headers
			if n%2 == 1 {
				legacy := *want
				if legacy.Method, legacy.Mode = "POST", ""; !utf8.Valid(body) {
					legacy.Body = nil
				}
				sameWebhook(t, got, &legacy)
			} else {
				sameWebhook(t, got, want)
			}
			fields := map[string][]string{}
			for _, h := range got.Headers {
				fields[h.Name] = h.Values
			}
			if !slices.Equal(fields["X-Latin1"], []string{everyByte[0x80:]}) || !slices.Equal(fields["X-Dup"], []string{"b", "a"}) || !slices.Equal(fields["X-Empty"], []string{""}) {
				t.Fatalf("reader %d got the headers %q", n, got.Headers)
			}
		}
	}
}

// TestHeldOverRedisRestart kills Redis while requests are held: those with a
// client that works on them, and those that wait for one.
func TestHeldOverRedisRestart(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	a, b := startReplicas(t, r, "RESPONSE_MODE=status")
	g := newGate(t, createdAnswer)
	startClient(t, a.addr, "busy", g.url)
	const each = 10
	var local, remote, waiting []<-chan outcome
	for i := range each {
		local = append(local, postHeld(t, a, "busy", fmt.Sprintf("a%d", i)))
		remote = append(remote, postHeld(t, b, "busy", fmt.Sprintf("b%d", i)))
		waiting = append(waiting, postHeld(t, a, "late", strconv.Itoa(i)), postHeld(t, b, "late", strconv.Itoa(i)))
	}
	eventually(t, "the target has all it can get", func() bool { return len(g.got) == 2*each })
	awaitHeld(t, a, 2*each)
	awaitHeld(t, b, 2*each)

	r.stop()
	for _, p := range []*program{a, b} {
		p.wait("redis is down")
		postRefused(t, p, "busy") // never held: nobody knows for how long
	}
	g.open()
	for _, told := range local { // their client's replica holds them: no bus between
		expectAnswer(t, told, 201)
	}
	awaitHeld(t, b, 2*each)

	r.restart()
	startClient(t, b.addr, "late", newTarget(t, nil).url)
	for _, told := range remote {
		expectAnswer(t, told, 201)
	}
	for _, told := range waiting {
		expectAnswer(t, told, 200)
	}
	if n := len(g.got); n != 2*each {
		t.Errorf("target saw %d requests, want %d", n, 2*each)
	}
}

// TestHeldOverShutdown ends the replica that holds requests.
func TestHeldOverShutdown(t *testing.T) {
	t.Parallel()
	a, b := startReplicas(t, startRedis(t), "RESPONSE_MODE=response", "HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT=5s")
	g := newGate(t, createdAnswer)
	startClient(t, b.addr, "busy", g.url)
	finished, never := postHeld(t, a, "busy", "x"), postHeld(t, a, "nobody", "x")
	g.next(t)
	awaitHeld(t, a, 2)
	a.cancel()
	eventually(t, "the replica is shutting down", func() bool { return probeStatus(t, a, "/ready") == 503 })
	g.open()
	expectAnswer(t, finished, 201)
	if o := expectAnswer(t, never, 503); o.header.Get("Retry-After") == "" {
		t.Errorf("no Retry-After: %+v", o)
	}
	if err := a.stop(); err != nil {
		t.Errorf("run returned %v", err)
	}
}

// TestHeldWhileReplicaIsCutOff breaks one replica's way to Redis. Its client
// stays on it, and gets what the other replica held meanwhile.
func TestHeldWhileReplicaIsCutOff(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	way := newLink(t, r.addr)
	env := []string{"RESPONSE_MODE=status", "RESPONSE_TIMEOUT=1m"}
	a, b := startOver(t, "redis://"+way.addr(), env...), startOver(t, r.url, env...)
	awaitReady(t, a, b)
	startClient(t, a.addr, "far", newTarget(t, nil).url)
	way.route("")
	a.wait("redis is down")
	told := postHeld(t, b, "far", "meanwhile")
	awaitHeld(t, b, 1)
	way.route(r.addr)
	awaitReady(t, a)
	expectAnswer(t, told, 200)
}

// TestStreamsMove bounds the age of streams: the client moves again and again
// under load, and the target notices nothing.
func TestStreamsMove(t *testing.T) {
	t.Parallel()
	a, b := startReplicas(t, startRedis(t), "SERVER_STREAM_MAX_AGE=1s", "HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT=10s", "LOG_LEVEL=info")
	var atTarget arrivals
	client := startClient(t, a.addr, "age", atTarget.target(t).url, "LOG_LEVEL=info")
	posts := newSender(t, webhookURL(a, "age", ""), webhookURL(b, "age", ""))
	stop := posts.run(5 * time.Millisecond)
	eventually(t, "the client moves", func() bool { return len(client.log.lines("stream ready")) >= 5 })
	stop()
	atTarget.check(t, posts)
	if n := len(client.log.lines("stream ended")); n != 0 {
		t.Errorf("%d streams ended under the client", n)
	}
}

// TestStreamsMoveWhileClientIsFull has a target so slow that a client cannot
// read on when its stream is over: it still has what came before the new
// stream was ready, and in part on both.
func TestStreamsMoveWhileClientIsFull(t *testing.T) {
	t.Parallel()
	a, b := startReplicas(t, startRedis(t), "SERVER_STREAM_MAX_AGE=1s", "HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT=3s", "LOG_LEVEL=info")
	type side struct {
		arrivals
		channel string
		gate    *gateTarget
		way     *tcpLink
		client  *program
		posts   *retrySender
		number  int
	}
	post := func(s *side, n int) {
		for range n {
			s.posts.post(t.Context(), strconv.Itoa(s.number))
			s.number++
		}
	}
	var sides []*side
	for i := range 4 { // which of two streams is read first is chance
		s := &side{channel: fmt.Sprintf("full-%d", i), gate: newGate(t, ok200), way: newLink(t, a.addr)}
		s.gate.note = s.note
		s.client = startClient(t, s.way.addr(), s.channel, s.gate.url, "TARGET_CONCURRENCY=1", "LOG_LEVEL=info")
		s.posts = newSender(t, webhookURL(a, s.channel, ""), webhookURL(b, s.channel, ""))
		s.posts.body = strings.Repeat("x", 32<<10) // more than the client reads at once
		post(s, 1)                                 // takes the only slot
		s.way.limit(0)                             // a new stream cannot even be asked for
		sides = append(sides, s)
	}
	for _, s := range sides {
		s.client.wait("stream asked to move")
		post(s, 5)
		s.way.limit(-1)
	}
	for _, s := range sides {
		eventually(t, "the client moves", func() bool { return len(s.client.log.lines("stream ready")) >= 2 })
		post(s, 5)
	}
	for _, s := range sides {
		eventually(t, "the old stream is over", func() bool {
			return slices.ContainsFunc(a.log.lines("subscriber gone"), func(r map[string]any) bool { return r["channel"] == s.channel })
		})
		s.gate.open()
		s.check(t, s.posts)
	}
}

// startBus runs one replica's bus without a server around it, and waits until
// it works.
func startBus(t testing.TB, addr, replica string, onSignal ...func(Signal)) (*RedisBus, *Hub) {
	t.Helper()
	bus, hub := runBus(t, addr, replica, onSignal...)
	awaitBus(t, bus)
	return bus, hub
}

func busOptions(addr string) RedisOptions {
	return RedisOptions{
		Server: RedisServer{Addr: addr}, Prefix: "bus:", MaxAttempts: -1,
		Backoff: Backoff{Initial: 5 * time.Millisecond, Max: 50 * time.Millisecond, Factor: 2},
	}
}

func runBus(t testing.TB, addr, replica string, onSignal ...func(Signal)) (*RedisBus, *Hub) {
	t.Helper()
	hub := &Hub{Limits: Limits{Subscribers: 1 << 20, PerAddress: 1 << 20, Buffer: 1 << 30}, OnSignal: func(Signal) {}}
	for _, f := range onSignal {
		hub.OnSignal = f
	}
	bus := NewRedisBus(busOptions(addr), replica, hub, slog.New(slog.DiscardHandler))
	hub.Watch = bus.watch
	running(t, func(ctx context.Context) { bus.Run(ctx) })
	return bus, hub
}

func awaitBus(t testing.TB, bus *RedisBus) {
	t.Helper()
	eventually(t, "the bus works", func() bool { return bus.Check(context.Background()) == nil })
}

// hubStream is a subscriber without a connection.
type hubStream struct {
	*Subscriber
	got chan *Event
}

func joinHub(t testing.TB, hub *Hub, channel string) hubStream {
	t.Helper()
	s := hubStream{&Subscriber{Channel: channel}, make(chan *Event, 10000)}
	s.Write = func() {
		for batch, _ := s.Take(nil); len(batch) > 0; batch, _ = s.Take(batch) {
			for _, e := range batch {
				s.got <- e
			}
		}
	}
	if err := hub.Subscribe(s.Subscriber); err != nil {
		t.Fatal(err)
	}
	s.Write()
	return s
}

func (s hubStream) isLive() bool {
	select {
	case <-s.Live:
		return true
	default:
		return false
	}
}

// joinLive is joinHub and the wait for the bus to confirm it.
func joinLive(t testing.TB, hub *Hub, channel string) hubStream {
	t.Helper()
	s := joinHub(t, hub, channel)
	eventually(t, "the subscription is live", s.isLive)
	return s
}

func busEvent(channel string, size int) *Event {
	return eventOf(channel, &Webhook{
		ID: newID("BENCH"), Method: "POST", Path: "/webhooks/" + channel + "/push", Time: time.Now(),
		Body: bytes.Repeat([]byte("x"), size),
	})
}

// mustPublish publishes e, from any goroutine.
func mustPublish(t testing.TB, bus *RedisBus, e *Event) {
	t.Helper()
	if _, err := bus.Publish(context.Background(), e); err != nil {
		t.Error(err)
	}
}

// TestReplicasWaitForEachOther takes Redis away and lets one replica come back
// before another: until that one is subscribed again, the first must not
// accept what the other's streams would miss.
func TestReplicasWaitForEachOther(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"old", "new"} {
		t.Run(kind+" replica comes first", func(t *testing.T) {
			r := startRedis(t)
			way := newLink(t, r.addr)
			var first *RedisBus
			if kind == "old" {
				first, _ = startBus(t, r.addr, "FIRSTAAAAAAAA")
			}
			_, hub := startBus(t, way.addr(), "SECONDAAAAAAA")
			var streams []hubStream
			for i := range 60 { // more subscriptions than one write holds
				streams = append(streams, joinLive(t, hub, strings.Repeat("long", 25)+strconv.Itoa(i)))
			}
			way.limit(4 << 10) // of what the second one says; the rest waits
			r.stop()
			way.route(r.addr)
			if kind == "new" {
				door := newLink(t, "")
				first, _ = runBus(t, door.addr(), "FIRSTAAAAAAAA")
				eventually(t, "it has tried and failed", func() bool { return door.tried.Load() > 2 })
				defer door.route("")
				door.route(r.addr)
			}
			r.restart()
			eventually(t, "both are back, one of them in part", func() bool {
				n := len(r.channels())
				return r.subscriptions("bus:@FIRSTAAAAAAAA") == 1 && 3 < n && n < len(streams)
			})
			if first.Check(t.Context()) == nil {
				t.Error("the first replica is ready before the second is subscribed")
			}
			way.limit(-1)
			awaitBus(t, first)
			for _, s := range streams {
				mustPublish(t, first, busEvent(s.Channel, 0))
			}
			for _, s := range streams {
				eventually(t, "the event is at the second replica", func() bool { return len(s.got) == 1 })
			}
		})
	}
}

// TestUnreadIsDelivered kills Redis while a replica has not yet read all that
// Redis sent it: other replicas have accepted those webhooks. All arrive, in their order.
func TestUnreadIsDelivered(t *testing.T) {
	r := startRedis(t)
	way := newLink(t, r.addr)
	near, hub := startBus(t, way.addr(), "NEAR")
	far, _ := startBus(t, r.addr, "FAR")
	s := joinLive(t, hub, "unread")
	way.silence()
	const n = 1000
	var sent []string
	for range n {
		e := busEvent("unread", 100)
		mustPublish(t, far, e)
		sent = append(sent, e.ID)
	}
	eventually(t, "Redis has written what it has accepted", func() bool { // it answers the publisher first
		list, _ := redis.String(r.cli("CLIENT", "LIST", "TYPE", "PUBSUB"), nil)
		return strings.Count(list, " obl=0 oll=0 ") == strings.Count(list, "\n")
	})
	r.freeze()
	before := way.sent.Load()
	go near.Publish(context.Background(), busEvent("unread", 100)) // its connection is the first to break
	eventually(t, "a request is under way", func() bool { return way.sent.Load() > before })
	r.stop()
	way.speak()
	for deadline := time.Now().Add(2 * time.Second); len(s.got) < n && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if got := len(s.got); got != n {
		t.Fatalf("%d of %d accepted events were delivered", got, n)
	}
	for i, id := range sent {
		if e := <-s.got; e.ID != id {
			t.Fatalf("event %d is not the one that was sent then", i)
		}
	}
}

// TestLargeEventsGoOneByOne: a large event waits for its turn, for a time, and
// the small ones do not wait with it.
func TestLargeEventsGoOneByOne(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	bus, hub := startBus(t, r.addr, testReplica)
	s := joinLive(t, hub, "ci")
	large, small := busEvent("ci", largeMessage), busEvent("ci", 100)
	bus.large <- struct{}{} // one is on its way
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if n, err := bus.Publish(over, large); err == nil {
		t.Errorf("published to %d", n)
	}
	mustPublish(t, bus, small)
	<-bus.large
	for range 2 {
		mustPublish(t, bus, large)
	}
	eventually(t, "one small and two large events", func() bool { return len(s.got) == 3 })
}

// TestFailedSessionIsNotLive breaks a connection after Redis has confirmed the
// subscriptions and before the bus works. A stream that comes then is not
// subscribed anywhere and must wait.
func TestFailedSessionIsNotLive(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	way := newLink(t, r.addr)
	bus, hub := startBus(t, way.addr(), testReplica)
	way.route("")
	eventually(t, "the bus is down", func() bool { return bus.Check(context.Background()) != nil })
	bus.mu.Lock()
	bus.peers = map[string]bool{newReplica(): true} // it will wait for another one
	bus.mu.Unlock()
	first := joinHub(t, hub, "here")
	if first.isLive() {
		t.Fatal("live without a bus")
	}
	way.route(r.addr)
	eventually(t, "Redis confirms", first.isLive)
	way.route("")
	eventually(t, "the connection is gone", func() bool { return r.subscriptions("bus:@all") == 0 })
	eventually(t, "a stream that comes now waits", func() bool {
		s := joinHub(t, hub, "here")
		defer hub.Leave(s.Subscriber, errPeerGone)
		return !s.isLive()
	})
}

// TestConfirmationIsTheLast has a stream come back to a channel that is just
// being left: what Redis confirms first is that it was left.
func TestConfirmationIsTheLast(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	way := newLink(t, r.addr)
	bus, hub := startBus(t, way.addr(), testReplica)
	inFlight := func() int {
		bus.mu.Lock()
		s := bus.session
		bus.mu.Unlock()
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.names["bus:again"].acks
	}
	first := joinLive(t, hub, "again")
	way.silence()
	hub.Leave(first.Subscriber, errPeerGone)
	eventually(t, "the channel is left", func() bool { return r.subscriptions("bus:again") == 0 })
	way.limit(0)
	second := joinHub(t, hub, "again")
	eventually(t, "it is wanted again", func() bool { return inFlight() == 2 })
	way.speak()
	eventually(t, "Redis has confirmed that it was left", func() bool { return inFlight() == 1 })
	if second.isLive() {
		t.Error("live before Redis knows")
	}
	way.limit(-1)
	eventually(t, "Redis has confirmed that it is wanted", second.isLive)
	mustPublish(t, bus, busEvent("again", 0))
	eventually(t, "the event is there", func() bool { return len(second.got) == 1 })
}

// TestSignalsAreNotLost has a replica say more at once than its connection
// takes. A sender waits for each of these signals, and nobody repeats them.
func TestSignalsAreNotLost(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	way := newLink(t, r.addr)
	var heard atomic.Int64
	startBus(t, r.addr, "HOLDER", func(sig Signal) {
		if sig.Kind == signalReceipt {
			heard.Add(1)
		}
	})
	bus, _ := startBus(t, way.addr(), "OTHER")
	way.limit(0)
	const n = 5000
	for i := range n {
		bus.Tell(Signal{Kind: signalReceipt, To: "HOLDER", Event: strconv.Itoa(i), Given: []Given{{strings.Repeat("x", 60), "c"}}})
	}
	way.limit(-1)
	eventually(t, "all signals arrive", func() bool { return heard.Load() == n })
	if n := bus.Sessions.Load(); n != 1 {
		t.Errorf("%d sessions, want 1", n)
	}
}

// TestNothingGrowsWithoutRedis has streams come and go on ever new channels
// while Redis is down.
func TestNothingGrowsWithoutRedis(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	bus, hub := startBus(t, r.addr, testReplica)
	r.stop()
	eventually(t, "the bus is down", func() bool { return bus.Check(context.Background()) != nil })
	for i := range 10000 {
		hub.Leave(joinHub(t, hub, strconv.Itoa(i)).Subscriber, errPeerGone)
	}
	bus.mu.Lock()
	n := len(bus.dirty)
	bus.mu.Unlock()
	if n > 100 {
		t.Errorf("%d channels without streams are remembered", n)
	}
	r.restart()
	awaitBus(t, bus)
	joinLive(t, hub, "after")
	eventually(t, "one live channel", func() bool { return len(r.channels()) == 3 })
}

// TestIdleConnectionsStay uses a Redis that closes idle connections, as
// managed ones do: the bus must not notice it by the next webhook.
func TestIdleConnectionsStay(t *testing.T) {
	t.Parallel()
	r := startRedis(t, "--timeout", "2")
	bus, hub := startBus(t, r.addr, testReplica)
	joinLive(t, hub, "idle")
	idle := connect(t, r.addr)
	if _, err := idle.Read(make([]byte, 1)); err != io.EOF { // as idle as a connection can be
		t.Fatal(err)
	}
	for range 4 {
		mustPublish(t, bus, busEvent("idle", 0))
	}
	if n := bus.Sessions.Load(); n != 1 {
		t.Errorf("%d sessions, want 1", n)
	}
}

// TestConnectionIsReplaced breaks the publishing connections of two replicas.
// Their subscriptions must not notice: what is published meanwhile would be lost.
func TestConnectionIsReplaced(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	near, hub := startBus(t, r.addr, "NEAR")
	far, _ := startBus(t, r.addr, "FAR")
	s := joinLive(t, hub, "replaced")
	began, sent, broken := time.Now(), 0, 0
	for after := 0; after < 100; {
		if broken == 0 && time.Since(began) > lasting*3/2 {
			r.cli("CLIENT", "KILL", "TYPE", "normal")
			broken = sent
		}
		if _, err := far.Publish(t.Context(), busEvent("replaced", 0)); err == nil {
			sent++
			after = sent - broken
			if broken == 0 {
				after = 0
			}
		} else if time.Since(began) > patience {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	eventually(t, "all that was accepted is there", func() bool { return len(s.got) >= sent })
	if near.Sessions.Load() != 1 || far.Sessions.Load() != 1 {
		t.Errorf("%d and %d sessions, want one each", near.Sessions.Load(), far.Sessions.Load())
	}
}

// TestDemotedRedis makes the Redis a replica of another one, as a failover does
// that leaves connections open.
func TestDemotedRedis(t *testing.T) {
	t.Parallel()
	r, other := startRedis(t), startRedis(t)
	bus, hub := startBus(t, r.addr, testReplica)
	s := joinLive(t, hub, "demoted")
	host, port, _ := net.SplitHostPort(other.addr)
	r.cli("REPLICAOF", host, port)
	eventually(t, "the bus is down", func() bool { return bus.Check(t.Context()) != nil })
	r.cli("REPLICAOF", "NO", "ONE")
	awaitBus(t, bus)
	mustPublish(t, bus, busEvent("demoted", 0))
	eventually(t, "the event is there", func() bool { return len(s.got) == 1 })
}

// TestRedisUser is what a Redis user needs to be allowed, and that a server is
// not ready, and says why once, when something is missing.
func TestRedisUser(t *testing.T) {
	t.Parallel()
	commands := []string{"+subscribe", "+unsubscribe", "+publish", "+pubsub", "+ping"}
	for _, missing := range append(commands, "") {
		t.Run("without "+missing, func(t *testing.T) {
			t.Parallel()
			r := startRedis(t)
			rights := []any{"SETUSER", "relay", "on", ">pw", "resetchannels", "&webhook-relay:*"}
			for _, command := range commands {
				if command != missing {
					rights = append(rights, command)
				}
			}
			r.cli("ACL", rights...)
			server := startOver(t, "redis://relay:pw@"+r.addr)
			switch missing {
			case "":
				awaitReady(t, server)
				f := openFeed(t, server, "user")
				postAccepted(t, server, "user", "x")
				f.only(t, "x")
				f.leave()
			case "+subscribe", "+publish", "+pubsub":
				eventually(t, "some tries", func() bool { return len(server.log.lines("redis is still down")) > 2 })
				down := server.log.lines("redis is down")
				if len(down) != 1 || !strings.Contains(down[0]["err"].(string), "NOPERM") {
					t.Errorf("logged %v", down)
				}
				if got := probeStatus(t, server, "/ready"); got != 503 {
					t.Errorf("/ready is %d", got)
				}
			}
		})
	}
}

// TestManyHeldAtOnce has one stream wake very many held requests: all of them are
// published.
func TestManyHeldAtOnce(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	hub := &Hub{Limits: Limits{Subscribers: 2, PerAddress: 2, Buffer: 1 << 30}, Budget: &Budget{Limit: 1 << 30}}
	log := slog.New(slog.DiscardHandler)
	bus := NewRedisBus(busOptions(r.addr), testReplica, hub, log)
	server, err := NewServer(ServerOptions{
		Replica: testReplica, MaxPayload: 1 << 20, HandlerTimeout: time.Second,
		Modes: byChannel[string]{Default: modeStatus}, Timeouts: byChannel[time.Duration]{Default: time.Minute},
	}, hub, bus, log)
	if err != nil {
		t.Fatal(err)
	}
	hub.OnSignal, hub.Watch = server.signal, bus.watch
	ctx, cancel := context.WithCancel(t.Context())
	var run, requests sync.WaitGroup
	defer run.Wait()
	defer cancel()
	run.Go(func() { bus.Run(ctx) })
	run.Go(func() { server.Run(ctx) })
	awaitBus(t, bus)
	const n = 4 * flightLimit / 200 * 200
	for sent := 0; sent < n; sent += 200 {
		for range 200 {
			requests.Go(func() {
				w := httptest.NewRecorder()
				if server.ServeHTTP(w, httptest.NewRequest("POST", "/webhooks/ci/x", strings.NewReader("{}"))); w.Code != 204 {
					t.Errorf("status %d", w.Code)
				}
			})
		}
		eventually(t, "they are held", func() bool {
			held := server.Held().Webhooks
			return held == sent+200
		})
	}
	s := &Subscriber{Channel: "ci", Client: "C", Responds: true}
	s.Write = func() {
		for batch, _ := s.Take(nil); len(batch) > 0; batch, _ = s.Take(batch) {
			for _, e := range batch {
				server.reported(e.ID, "ci", "C", &Answer{Status: 204})
			}
		}
	}
	if err := hub.Subscribe(s); err != nil {
		t.Fatal(err)
	}
	<-s.Live
	bus.Tell(Signal{Kind: signalReady, From: testReplica, Channel: "ci", Subscriber: s.ID, Client: "C"})
	s.Write()
	eventually(t, "all are answered", func() bool {
		held := server.Held().Webhooks
		return held == 0
	})
	requests.Wait()
	s.Writers.Wait()
}

// TestReceiversThatAreNoReplicas has somebody look on with PSUBSCRIBE, as Redis'
// tools do: nobody waits for what such a receiver will never say.
func TestReceiversThatAreNoReplicas(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	a, b := startReplicas(t, r, "RESPONSE_MODE=status", "RESPONSE_TIMEOUT=1m")
	conn, err := redis.DialURL(r.url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Do("PSUBSCRIBE", "*"); err != nil {
		t.Fatal(err)
	}
	tg := newTarget(t, func(recorded) string { return "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n" })
	startClient(t, a.addr, "ci", tg.url).wait("stream ready")
	openFeed(t, a, "legacy")
	for channel, want := range map[string]int{"ci": 401, "legacy": 200} {
		if status, _, _ := send(t, "POST", webhookURL(b, channel, "x"), "{}"); status != want {
			t.Errorf("%s: status %d, want %d", channel, status, want)
		}
	}
}

// TestSignalsAtTheEnd listens for what a server says of its streams while it
// ends: the others must hear of each.
func TestSignalsAtTheEnd(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	server := startOver(t, r.url, "HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT=2s", "REDIS_CHANNEL_PREFIX=bus:", "LOG_LEVEL=info")
	awaitReady(t, server)
	var left atomic.Int64
	startBus(t, r.addr, "OTHER", func(sig Signal) {
		if sig.Kind == signalLeft {
			left.Add(1)
		}
	})
	const n = 100
	for i := range n {
		openFeed(t, server, "end"+strconv.Itoa(i))
	}
	if err := server.stop(); err != nil {
		t.Error(err)
	}
	eventually(t, "all have left", func() bool { return left.Load() == n })
}

// BenchmarkRedisPublish publishes from 1, 8 and 64 concurrent requests, beside
// the same bytes on a bare connection with as many commands in a batch: 16,000 and
// 18,500 a second from 1, 218,000 and 553,000 from 64.
func BenchmarkRedisPublish(b *testing.B) {
	r := startRedis(b)
	bus, _ := startBus(b, r.addr, "BENCH")
	conn, err := redis.DialURL(r.url)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	e := busEvent("bench", 1<<10)
	const total = 1920
	for _, n := range []int{1, 8, 64} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			duel(b, "publish", total, func() {
				var wg sync.WaitGroup
				for range n {
					wg.Go(func() {
						for range total / n {
							mustPublish(b, bus, e)
						}
					})
				}
				wg.Wait()
			}, func() {
				for range total / n {
					for range n {
						conn.Send("PUBLISH", bus.eventName("bench"), e.wire)
					}
					conn.Flush()
					for range n {
						if _, err := conn.Receive(); err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		})
	}
}

// fakeRedis is a Redis that says what a test wants it to. It knows just what a
// RedisBus needs.
type fakeRedis struct {
	listener net.Listener
	conns    sync.WaitGroup

	later func(lane string, f func()) // set before use: when a message arrives; nil: at once

	mu      sync.Mutex
	instead func(command []string) string // guarded by mu, like all below; "": the true reply
	subs    map[net.Conn]map[string]bool
	out     map[net.Conn]chan string // what is to be written
}

func newFakeRedis(t testing.TB, l net.Listener, instead func(command []string) string) *fakeRedis {
	t.Helper()
	f := &fakeRedis{listener: l, instead: instead, subs: map[net.Conn]map[string]bool{}, out: map[net.Conn]chan string{}}
	f.conns.Go(func() {
		for {
			conn, err := f.listener.Accept()
			if err != nil {
				return
			}
			out := make(chan string, 1<<16)
			f.mu.Lock()
			f.out[conn] = out
			f.mu.Unlock()
			f.conns.Go(func() { f.serve(conn) })
			f.conns.Go(func() {
				for text := range out {
					io.WriteString(conn, text)
				}
			})
		}
	})
	t.Cleanup(func() {
		f.listener.Close()
		f.mu.Lock()
		for conn := range f.out {
			conn.Close()
		}
		f.mu.Unlock()
		f.conns.Wait()
	})
	return f
}

func (f *fakeRedis) addr() string { return f.listener.Addr().String() }

// say queues text for conn, unless that is gone. It needs mu.
func (f *fakeRedis) say(conn net.Conn, text string) {
	if out := f.out[conn]; out != nil {
		out <- text
	}
}

// bulk is an array in the protocol of Redis: strings, and integers as such.
func bulk(values ...any) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(values))
	for _, v := range values {
		if n, ok := v.(int); ok {
			fmt.Fprintf(&b, ":%d\r\n", n)
		} else {
			fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(fmt.Sprint(v)), v)
		}
	}
	return b.String()
}

func (f *fakeRedis) serve(conn net.Conn) {
	defer func() {
		f.mu.Lock()
		delete(f.subs, conn)
		close(f.out[conn])
		delete(f.out, conn)
		f.mu.Unlock()
		conn.Close()
	}()
	r := bufio.NewReader(conn)
	number := func(prefix byte) int {
		line, _ := r.ReadString('\n')
		if len(line) < 2 || line[0] != prefix {
			return -1
		}
		n, err := strconv.Atoi(strings.TrimSpace(line[1:]))
		if err != nil {
			return -1
		}
		return n
	}
	for {
		n := number('*')
		if n < 1 {
			return
		}
		command := make([]string, n)
		for i := range command {
			size := number('$')
			if size < 0 {
				return
			}
			b := make([]byte, size+2)
			if _, err := io.ReadFull(r, b); err != nil {
				return
			}
			command[i] = string(b[:size])
		}
		f.mu.Lock()
		reply := f.reply(conn, command)
		if f.instead != nil {
			if other := f.instead(command); other != "" {
				reply = other
			}
		}
		f.say(conn, reply)
		f.mu.Unlock()
	}
}

// reply is what Redis says to command. It needs mu.
func (f *fakeRedis) reply(conn net.Conn, command []string) string {
	switch name := command[len(command)-1]; strings.ToUpper(command[0]) {
	case "SUBSCRIBE":
		if f.subs[conn] == nil {
			f.subs[conn] = map[string]bool{}
		}
		f.subs[conn][name] = true
		return bulk("subscribe", name, len(f.subs[conn]))
	case "UNSUBSCRIBE":
		delete(f.subs[conn], name)
		return bulk("unsubscribe", name, len(f.subs[conn]))
	case "PUBLISH":
		n := 0
		for sub, names := range f.subs {
			if names[command[1]] {
				f.pass(conn, sub, command[1], command[2])
				n++
			}
		}
		return fmt.Sprintf(":%d\r\n", n)
	case "PUBSUB": // CHANNELS
		var all []any
		for _, names := range f.subs {
			for name := range names {
				all = append(all, name)
			}
		}
		return bulk(all...)
	case "ROLE":
		return bulk("master", 0)
	case "PING":
		if f.subs[conn] != nil {
			return bulk("pong", "")
		}
		return "+PONG\r\n"
	default:
		return "+OK\r\n"
	}
}

// pass brings a message of conn to sub. It needs mu.
func (f *fakeRedis) pass(conn, sub net.Conn, name, message string) {
	text := bulk("message", name, message)
	if f.later == nil {
		f.say(sub, text)
		return
	}
	f.later(fmt.Sprint(conn.RemoteAddr(), name, sub.RemoteAddr()), func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.say(sub, text)
	})
}

// push says text on all connections that are subscribed.
func (f *fakeRedis) push(text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for conn := range f.subs {
		f.say(conn, text)
	}
}

// gibberish is what no Redis says.
var gibberish = map[string]string{
	"a string longer than memory":  "$9223372036854775807\r\n",
	"a length beyond 64 bits":      "$99999999999999999999\r\n",
	"a length that turns negative": "$9223372036854775808\r\n",
	"a negative array":             "*-5\r\n",
	"a negative string":            "$-5\r\n",
	"an array longer than memory":  "*9223372036854775807\r\n",
	"an array beyond 64 bits":      "*99999999999999999999\r\n",
	"a large array of large ones":  "*3\r\n$7\r\nmessage\r\n*9223372036854775807\r\n",
	"no type":                      "hello\r\n",
	"an empty line":                "\r\n",
	"nothing but a type":           "$\r\n",
	"an empty array":               "*0\r\n",
	"a nil array":                  "*-1\r\n",
	"a nil string":                 "$-1\r\n",
	"a message without a channel":  "*1\r\n$7\r\nmessage\r\n",
	"a message of numbers":         "*3\r\n$7\r\nmessage\r\n:1\r\n:2\r\n",
	"a confirmation of nothing":    bulk("subscribe", "", 1),
	"a confirmation of a stranger": bulk("subscribe", "bus:stranger", 1),
	"unsubscribed from everything": bulk("unsubscribe", "bus:@all", 0),
	"an error":                     "-ERR canary\r\n",
	"an unknown push":              bulk("canary", "x", "y"),
}

// TestHostileRedis: whatever Redis says to the connection that listens, in place
// of a confirmation or later, the process goes on and the bus works again as
// soon as Redis does.
func TestHostileRedis(t *testing.T) {
	works := func(t *testing.T, bus *RedisBus, hub *Hub) {
		t.Helper()
		awaitBus(t, bus)
		s := joinHub(t, hub, "works")
		eventually(t, "an event comes through", func() bool {
			bus.Publish(t.Context(), busEvent("works", 0))
			return len(s.got) > 0
		})
	}
	t.Run("confirmed twice", func(t *testing.T) {
		f := newFakeRedis(t, loopback(t), func(command []string) string {
			if name := command[len(command)-1]; command[0] == "SUBSCRIBE" && strings.HasSuffix(name, "@all") {
				return strings.Repeat(bulk("subscribe", name, 1), 2)
			}
			return ""
		})
		bus, hub := startBus(t, f.addr(), testReplica)
		works(t, bus, hub)
		f.push(strings.Repeat(bulk("subscribe", "bus:@all", 1), 3))
		works(t, bus, hub)
	})
	for name, text := range gibberish {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // some of it ends a session only with its time
			var said atomic.Bool
			f := newFakeRedis(t, loopback(t), func(command []string) string {
				if command[0] == "SUBSCRIBE" && said.CompareAndSwap(false, true) {
					return text
				}
				return ""
			})
			bus, hub := runBus(t, f.addr(), testReplica)
			eventually(t, "it is said", said.Load)
			works(t, bus, hub)
			f.push(text)
			works(t, bus, hub)
		})
	}
}

// BenchmarkReplicaLatency is the time from a publish at one replica to the
// event in a subscriber's queue at another: p50 94 µs, p99 174 µs.
func BenchmarkReplicaLatency(b *testing.B) {
	r := startRedis(b)
	from, _ := startBus(b, r.addr, "FROM")
	_, hub := startBus(b, r.addr, "TO")
	s := joinLive(b, hub, "latency")
	e := busEvent("latency", 1<<10)
	var took []time.Duration
	b.ReportAllocs()
	for b.Loop() {
		began := time.Now()
		mustPublish(b, from, e)
		<-s.got
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}
