package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The simulation: whole relays, of several replicas and clients, in a bubble in
// which time passes as fast as the machine can count it. A seed chooses what
// breaks, when, and how long everything takes; what the relay promises is checked
// at the end of each run.
//
//	go test -run 'TestSimulation$' -seeds=5000          more of them
//	go test -run 'TestSimulation$' -seed=17 -seeds=1    one again, told in full with -v
//
// Goroutines run as Go pleases, so that a failing seed may need -count=50.

var (
	simFirst = flag.Uint64("seed", 1, "first seed of the simulation")
	simCount = flag.Uint64("seeds", 80, "seeds of the simulation")
)

// TestSimulation: whatever breaks, nothing that was accepted is lost, nothing is
// forwarded twice by one client, no sender is told of a success that was none,
// and nothing stays behind; see simWorld.check.
func TestSimulation(t *testing.T) {
	for seed := *simFirst; seed < *simFirst+*simCount; seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { simulate(t, seed) })
		})
	}
}

// What a run may suffer: each kind has all of those before it.
const (
	simCalm    = iota // nothing
	simRolling        // clients and replicas are stopped in good order and replaced
	simTargets        // targets fail
	simNetwork        // connections break, stall or fall silent, and the bus drops its sessions
	simCrashes        // clients and replicas die
)

// The settings of all runs.
const (
	simHoldTime = 10 * time.Second
	simHandler  = 8 * time.Second // handler timeout
	simResponse = 5 * time.Second
	simRetry    = 15 * time.Second // retry window
)

// simWorld is one run.
type simWorld struct {
	t     *testing.T
	plan  *rand.Rand // chooses what happens; for the test's goroutine alone
	began time.Time
	kind  int
	modes byChannel[string]
	redis *simHost
	front *simHost  // where senders and legacy readers live
	log   logBuffer // all that was said
	wg    sync.WaitGroup

	buffer, concurrency int64
	maxAge              time.Duration
	latency             time.Duration // longest, of a connection
	redisDelay          time.Duration // longest, of a message in Redis
	delay               time.Duration // before a replica shuts down

	mu       sync.Mutex
	chances  *rand.Rand            // guarded by mu, like all below: chooses delays
	hosts    map[string]*simHost   // by address
	replicas []*simReplica         // all there ever were
	clients  []*simClient          // likewise
	reads    []*listener           // a legacy reader's streams
	targets  map[string]*simTarget // by channel
	posts    []*simPost
	events   map[string]*simEvent // by id
	lanes    map[string]time.Time // when the last message of each arrives in Redis
}

// simPost is one webhook, which its sender posts once.
type simPost struct {
	path, channel, mode string
	size                int
	status              int    // 0: no answer
	id                  string // of its event; empty: not known
	began, ended        time.Time
	calls               []simCall // to the target, as far as it answered
}

// successes counts the target's by client.
func (p *simPost) successes() map[*simClient]int {
	by := map[*simClient]int{}
	for _, call := range p.calls {
		if call.status == http.StatusOK {
			by[call.client]++
		}
	}
	return by
}

// simCall is one answer of a target.
type simCall struct {
	client *simClient
	status int
}

// simEvent is what became known of one event on its way.
type simEvent struct {
	given  map[string][]string // client names ("": legacy) by publication
	holder []string            // replicas that held it
	handed bool                // a replica handed it to another

	// As the log says in the end.
	gaveUp bool   // a client did
	lost   string // the reason, when a replica said so
	by     string // who said it
	when   time.Time
}

// event needs mu.
func (w *simWorld) event(id string) *simEvent {
	e := w.events[id]
	if e == nil {
		e = &simEvent{given: map[string][]string{}, holder: []string{replicaOf(id)}}
		w.events[id] = e
	}
	return e
}

func (w *simWorld) note(format string, args ...any) {
	fmt.Fprintf(&w.log, "%8.3f  %s\n", time.Since(w.began).Seconds(), fmt.Sprintf(format, args...))
}

func (w *simWorld) upTo(most time.Duration) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Duration(w.chances.Int64N(int64(most) + 1))
}

// Connections: pipes that delay, stall or lose what comes through them.

// simHost is a machine: it listens until it is down, and everything that it is
// connected to goes with it.
type simHost struct {
	*pipes
	w       *simWorld
	name    string
	addr    *net.TCPAddr
	links   []*simLink // guarded by mu, like the next; all there ever were
	stalled time.Time  // until then
}

func (w *simWorld) newHost(name string) *simHost {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(w.hosts) + 1
	h := &simHost{pipes: newPipes(), w: w, name: name, addr: &net.TCPAddr{IP: net.IPv4(10, 0, byte(n>>8), byte(n)), Port: 4711}}
	w.hosts[h.addr.String()] = h
	return h
}

// simLink is one connection between two hosts, and simConn one end of it.
type simLink struct {
	hosts [2]*simHost
	ends  [2]net.Conn
	over  context.Context
	end   context.CancelFunc // of over
	mute  atomic.Bool        // nothing arrives any more, not even the end
}

type simConn struct {
	net.Conn
	*simLink
	from net.Addr
}

func (c simConn) RemoteAddr() net.Addr { return c.from }

// Read waits as long as it takes to arrive.
func (c simConn) Read(p []byte) (int, error) {
	for {
		n, err := c.Conn.Read(p)
		if errors.Is(err, os.ErrDeadlineExceeded) || err == io.ErrClosedPipe { // by this side
			return n, err
		}
		if w := c.hosts[0].w; c.hosts[1] != w.redis { // whose messages take their own time
			time.Sleep(w.upTo(w.latency))
		}
		for _, h := range c.hosts {
			h.mu.Lock()
			wait := time.Until(h.stalled)
			h.mu.Unlock()
			if wait > 0 { // a timer that is due at once now and then crashes the race detector's runtime in a bubble (Go 1.26.8)
				sleep(c.over, wait)
			}
		}
		if !c.mute.Load() {
			return n, err
		}
		if err != nil {
			<-c.over.Done()
			return 0, err
		}
	}
}

var errSimRefused = errors.New("connection refused")

func (h *simHost) dial(ctx context.Context, to *simHost) (net.Conn, error) {
	if to == nil || !sleep(ctx, h.w.upTo(h.w.latency)) {
		return nil, errSimRefused
	}
	l := &simLink{hosts: [2]*simHost{h, to}}
	l.over, l.end = context.WithCancel(context.Background())
	l.ends[0], l.ends[1] = net.Pipe()
	for _, host := range l.hosts {
		host.mu.Lock()
		if host.down {
			l.cut()
		}
		host.links = append(host.links, l)
		host.mu.Unlock()
	}
	select {
	case to.conns <- simConn{l.ends[1], l, h.addr}:
		return simConn{l.ends[0], l, to.addr}, nil
	case <-to.done:
	case <-ctx.Done():
	case <-l.over.Done():
	}
	l.cut()
	return nil, errSimRefused
}

func (l *simLink) cut() {
	l.end()
	for _, end := range l.ends {
		end.Close()
	}
}

// open lists the connections of h, or those that lead to a replica.
func (h *simHost) open(all bool) (links []*simLink) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range h.links {
		if l.over.Err() == nil && (all || len(l.hosts[1].name) == replicaLength) {
			links = append(links, l)
		}
	}
	return links
}

// crash breaks all of h for good.
func (h *simHost) crash() {
	h.cut(true)
	h.Close()
	for _, l := range h.open(true) {
		if !l.mute.Load() { // it will be cut
			l.cut()
		}
	}
}

// silence breaks the connections of h without telling anybody before d is over.
func (h *simHost) silence(d time.Duration) {
	for _, l := range h.open(false) {
		l.mute.Store(true)
		time.AfterFunc(d, l.cut)
	}
}

// stall holds everything up for d.
func (h *simHost) stall(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stalled = time.Now().Add(d)
}

// Redis, which is one of the tests, behind the same connections.

const simPrefix = "relay:"

// startRedis starts it. It keeps the order only of what one replica sends to one
// name: less than a true one.
func (w *simWorld) startRedis() {
	w.redis = w.newHost("redis")
	serveRedis(w.t, w.redis, w.overhear, func(lane string, arrive func()) {
		w.mu.Lock()
		defer w.mu.Unlock()
		due := time.Now().Add(time.Duration(w.chances.Int64N(int64(w.redisDelay) + 1)))
		if last := w.lanes[lane]; !due.After(last) {
			due = last.Add(1)
		}
		w.lanes[lane] = due
		time.AfterFunc(time.Until(due), arrive)
	})
}

// overhear notes what replicas publish.
func (w *simWorld) overhear(name, message string) {
	if name = strings.TrimPrefix(name, simPrefix); name[0] != '@' {
		e := must(openEvent(name, []byte(message)))
		w.note("%s publishes event=%s round=%d only=%s", e.Holder, e.ID, e.Round, e.Only)
		return
	}
	for data := []byte(message); len(data) > 0; {
		var wire string
		data = must(cutFields(data, &wire))
		sig := must(openSignal([]byte(wire)))
		w.told(&sig)
	}
}

// told notes what one replica tells another, or itself.
func (w *simWorld) told(sig *Signal) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := w.event(sig.Event)
	switch sig.Kind {
	case signalReceipt:
		publication := fmt.Sprint(sig.To, sig.Round)
		for _, g := range sig.Given {
			e.given[publication] = append(e.given[publication], g.Client)
		}
	case signalHand:
		e.handed = true
	}
}

// unhurried is a connection whose writer never waits, as where there are buffers: who
// writes to Redis holds a lock, under which time would stand still.
type unhurried struct {
	net.Conn
	sent chan []byte
	over context.Context
	end  context.CancelFunc // of over
}

func newUnhurried(conn net.Conn) *unhurried {
	u := &unhurried{Conn: conn, sent: make(chan []byte, 1<<12)}
	u.over, u.end = context.WithCancel(context.Background())
	go func() { // ends with the connection
		defer u.end()
		for {
			select {
			case p := <-u.sent:
				if _, err := conn.Write(p); err != nil {
					return
				}
			case <-u.over.Done():
				return
			}
		}
	}()
	return u
}

func (u *unhurried) Write(p []byte) (int, error) {
	select {
	case u.sent <- bytes.Clone(p):
		return len(p), nil
	case <-u.over.Done():
		return 0, net.ErrClosed
	}
}

func (u *unhurried) Close() error {
	u.end()
	return u.Conn.Close()
}

// fakeRedis is a Redis in memory. It knows just what a RedisBus asks for.
type fakeRedis struct {
	overhear func(name, message string)
	later    func(lane string, arrive func()) // decides when a message arrives

	mu   sync.Mutex
	subs map[net.Conn]map[string]bool // guarded by mu, like the next
	out  map[net.Conn]chan string     // what is to be written
}

// serveRedis serves until l is closed and all connections are gone.
func serveRedis(t testing.TB, l net.Listener, overhear func(name, message string), later func(lane string, arrive func())) {
	f := &fakeRedis{overhear: overhear, later: later, subs: map[net.Conn]map[string]bool{}, out: map[net.Conn]chan string{}}
	running(t, func(context.Context) {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			out := make(chan string, 1<<16)
			f.mu.Lock()
			f.subs[conn], f.out[conn] = map[string]bool{}, out
			f.mu.Unlock()
			go f.serve(conn) // both end with the connection
			go func() {
				for text := range out {
					io.WriteString(conn, text)
				}
			}()
		}
	})
}

// say queues text for conn, unless that is gone. It needs mu.
func (f *fakeRedis) say(conn net.Conn, text string) {
	if out := f.out[conn]; out != nil {
		out <- text
	}
}

// serve answers the commands that come over conn: arrays of strings.
func (f *fakeRedis) serve(conn net.Conn) {
	r := bufio.NewReader(conn)
	var n, size int
	for {
		if _, err := fmt.Fscanf(r, "*%d\r\n", &n); err != nil {
			break
		}
		command := make([]string, n)
		for i := range command {
			fmt.Fscanf(r, "$%d\r\n", &size)
			text := make([]byte, size+2)
			io.ReadFull(r, text)
			command[i] = string(text[:size])
		}
		f.mu.Lock()
		f.say(conn, f.reply(conn, command))
		f.mu.Unlock()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.out[conn])
	delete(f.subs, conn)
	delete(f.out, conn)
	conn.Close()
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

// reply is what Redis says to command. It needs mu.
func (f *fakeRedis) reply(conn net.Conn, command []string) string {
	switch name := command[len(command)-1]; strings.ToUpper(command[0]) {
	case "SUBSCRIBE":
		f.subs[conn][name] = true
		return bulk("subscribe", name, len(f.subs[conn]))
	case "UNSUBSCRIBE":
		delete(f.subs[conn], name)
		return bulk("unsubscribe", name, len(f.subs[conn]))
	case "PUBLISH":
		name, n := command[1], 0
		f.overhear(name, command[2])
		for sub, names := range f.subs {
			if names[name] {
				n++
				f.later(fmt.Sprint(conn.RemoteAddr(), name, sub.RemoteAddr()), func() {
					f.mu.Lock()
					defer f.mu.Unlock()
					f.say(sub, bulk("message", name, command[2]))
				})
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
		if len(f.subs[conn]) > 0 {
			return bulk("pong", "")
		}
		return "+PONG\r\n"
	default:
		return "+OK\r\n"
	}
}

// Processes.

// simProcess is what all processes have. What it writes is its log.
type simProcess struct {
	w             *simWorld
	who           string
	host          *simHost
	dead          atomic.Bool   // it has crashed
	over          atomic.Bool   // nobody may stop it any more
	done          chan struct{} // closed when nothing of it is left
	born, stopped time.Time     // guarded by w.mu: when it started, and was asked to stop
}

func (p *simProcess) start(w *simWorld, who string) *slog.Logger {
	p.w, p.who, p.host, p.done, p.born = w, who, w.newHost(who), make(chan struct{}), time.Now()
	w.note("%s starts", who)
	return slog.New(slog.NewJSONHandler(p, &slog.HandlerOptions{Level: slog.LevelDebug})).With("who", who)
}

// Write says nothing of the dead.
func (p *simProcess) Write(line []byte) (int, error) {
	if p.dead.Load() {
		return len(line), nil
	}
	return p.w.log.Write(line)
}

// ends reports whether p is to stop or crash now.
func (p *simProcess) ends(how string) bool {
	if p.over.Swap(true) {
		return false
	}
	p.w.note("%s %s", p.who, how)
	p.note(&p.stopped)
	return true
}

func (p *simProcess) note(at *time.Time) {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	*at = time.Now()
}

// simReplica is one server process.
type simReplica struct {
	simProcess
	hub    *Hub
	server *Server
	bus    *RedisBus
	web    *http.Server
	finish func()
	leaves time.Time // guarded by w.mu, like the next: when it began to shut down
	back   time.Time // when it can reach Redis again
}

func (w *simWorld) startReplica() *simReplica {
	r := &simReplica{hub: &Hub{Limits: Limits{Subscribers: 1000, PerAddress: 1000, Buffer: w.buffer}, Budget: &Budget{Limit: 64 << 20}}}
	log := r.start(w, newReplica())
	r.bus = NewRedisBus(RedisOptions{
		Server: RedisServer{Addr: "redis:6379"}, Prefix: simPrefix, MaxAttempts: -1,
		Backoff: Backoff{Initial: 100 * time.Millisecond, Max: time.Second, Factor: 2, Jitter: true},
	}, r.who, r.hub, log)
	r.bus.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
		w.mu.Lock()
		away := time.Now().Before(r.back)
		w.mu.Unlock()
		if away {
			return nil, errSimRefused
		}
		conn, err := r.host.dial(ctx, w.redis)
		if err != nil {
			return nil, err
		}
		return newUnhurried(conn), nil
	}
	r.server = must(NewServer(ServerOptions{
		Replica: r.who, MaxPayload: 3 << 20, Heartbeat: time.Second, HoldTime: simHoldTime, StreamMaxAge: w.maxAge,
		HandlerTimeout: simHandler, Modes: w.modes, Timeouts: byChannel[time.Duration]{Default: simResponse},
	}, r.hub, r.bus, log))
	r.hub.Watch, r.bus.OnCutOff = r.bus.watch, r.server.AskToMove
	r.hub.OnSignal = func(sig Signal) {
		r.hears(&sig)
		r.server.signal(sig)
	}
	r.web = webServer(r.server, log)
	ctx, cancel := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	parts.Go(func() { r.web.Serve(r.host) })
	parts.Go(func() { r.bus.Run(ctx) })
	parts.Go(func() { r.server.Run(ctx) })
	r.finish = func() {
		cancel()
		parts.Wait()
		r.host.crash()
		close(r.done)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.replicas = append(w.replicas, r)
	return r
}

// hears notes what the replica is told.
func (r *simReplica) hears(sig *Signal) {
	switch {
	case sig.From == r.who && sig.To == r.who:
		r.w.told(sig)
	case sig.Kind == signalHand:
		r.w.mu.Lock()
		e := r.w.event(sig.Event)
		e.holder = append(e.holder, r.who)
		r.w.mu.Unlock()
	}
	event := ""
	if sig.Event != "" {
		event = " event=" + sig.Event
	}
	r.w.note("%s hears %s%s from=%s subscriber=%s client=%s round=%d given=%v", r.who, sig.Kind, event, sig.From, sig.Subscriber, sig.Client, sig.Round, sig.Given)
}

// away takes Redis from r for d: both see that at once, or one of them later, or
// both.
func (r *simReplica) away(d time.Duration) {
	r.w.mu.Lock()
	r.back = time.Now().Add(d)
	r.w.mu.Unlock()
	for _, l := range r.host.open(true) {
		if l.hosts[1] != r.w.redis {
			continue
		}
		if r.w.upTo(1) == 0 {
			l.cut()
			continue
		}
		l.mute.Store(true)
		time.AfterFunc(r.w.upTo(simUnseen), l.cut)
		if r.w.upTo(1) == 0 {
			l.ends[0].Close()
		}
	}
}

const simUnseen = 1500 * time.Millisecond

// stop is SIGTERM, as runServer takes it.
func (r *simReplica) stop() {
	if !r.ends("is stopped") {
		return
	}
	r.server.Drain()
	time.Sleep(r.w.delay)
	r.note(&r.leaves)
	finish, cancel := context.WithTimeout(context.Background(), simHandler)
	defer cancel()
	r.server.Shutdown()
	if r.web.Shutdown(finish) != nil {
		r.web.Close()
	}
	r.bus.Flush(finish)
	r.finish()
	r.w.note("%s has ended", r.who)
}

// crash ends the process at once. What is left of it in the bubble reaches nobody.
func (r *simReplica) crash() {
	if !r.ends("crashes") {
		return
	}
	r.dead.Store(true)
	r.away(time.Hour)
	r.host.crash()
	r.server.Shutdown()
	r.web.Close()
	r.finish()
}

// last reports whether r was stopped when no other replica was there. It needs w.mu.
func (r *simReplica) last(at time.Time) bool {
	return r.stopped.Before(at) && !slices.ContainsFunc(r.w.replicas, func(o *simReplica) bool {
		return o != r && o.born.Add(time.Second).Before(at) && (o.stopped.IsZero() || o.stopped.After(at))
	})
}

// up lists the replicas that nobody has stopped.
func (w *simWorld) up() []*simReplica {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(w.replicas), func(r *simReplica) bool { return r.over.Load() })
}

// balanced dials from h, for an http.Transport, a replica that a balancer chooses
// which probes: mostly one that is ready.
func (h *simHost) balanced(ctx context.Context, _, _ string) (net.Conn, error) {
	h.w.mu.Lock()
	all := slices.Clone(h.w.replicas)
	h.w.mu.Unlock()
	var ready, others []*simHost
	for _, r := range all {
		switch {
		case isClosed(r.done), r.dead.Load():
		case r.server.Check(ctx) == nil:
			ready = append(ready, r.host)
		default:
			others = append(others, r.host)
		}
	}
	if late := h.w.upTo(9) == 0; len(ready) == 0 || late && len(others) > 0 {
		ready = others
	}
	if len(ready) == 0 {
		return nil, errSimRefused
	}
	return h.dial(ctx, ready[h.w.upTo(time.Duration(len(ready)-1))])
}

// simClient is one client process.
type simClient struct {
	*Client
	simProcess
	channel string
	cancel  func()
	had     map[string]bool // guarded by w.mu: events that it may have reported and had not forwarded when it crashed
	there   [][2]time.Time  // guarded by w.mu: from when to when it had a stream
}

func (w *simWorld) startClient(channel string) *simClient {
	c := &simClient{channel: channel}
	w.mu.Lock()
	n := len(w.clients) + 1
	w.mu.Unlock()
	log := c.start(w, fmt.Sprintf("client %d for %s", n, channel))
	c.Client = NewClient(ClientOptions{
		Source: must(url.Parse("http://relay.test/subscribe/" + channel + "/")), Target: must(url.Parse("http://target.test")),
		ReconnectInterval: time.Second, HandlerTimeout: simHandler,
		Timeout: 5 * time.Second, RetryWindow: simRetry, Concurrency: int(w.concurrency), RetryOn: passing,
	}, log)
	c.source.Proxy, c.target.Proxy = nil, nil
	c.source.DialContext = c.host.balanced
	c.target.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		to := w.targets[channel]
		if to.does.Load() == simRefuses {
			return nil, errSimRefused
		}
		return c.host.dial(ctx, to.host)
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	go func() {
		defer close(c.done)
		c.Run(ctx)
		c.host.crash()
	}()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clients = append(w.clients, c)
	return c
}

// stop is SIGTERM.
func (c *simClient) stop() {
	if c.ends("is stopped") {
		c.cancel()
		<-c.done
		c.w.note("%s has ended", c.who)
	}
}

func (c *simClient) crash() {
	if !c.ends("crashes") {
		return
	}
	c.dead.Store(true)
	c.host.crash()
	had := map[string]bool{}
	c.memory.mu.Lock()
	for id, e := range c.memory.entries {
		had[id] = e.taken
	}
	c.memory.mu.Unlock()
	c.reporter.mu.Lock()
	for _, r := range slices.Concat(c.reporter.queue, c.reporter.lazy) {
		delete(had, r.id) // again: it may have been reported before
	}
	c.reporter.mu.Unlock()
	c.w.mu.Lock()
	c.had = had
	c.w.mu.Unlock()
	c.cancel()
	<-c.done
}

// runs lists the clients of channel, or all, that nobody has stopped.
func (w *simWorld) runs(channel string) []*simClient {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(w.clients), func(c *simClient) bool {
		return c.over.Load() || channel != "" && c.channel != channel
	})
}

// watch notes which clients are there, until ctx ends.
func (w *simWorld) watch(ctx context.Context) {
	const every = 100 * time.Millisecond
	for sleep(ctx, every) {
		now := time.Now()
		for _, c := range w.runs("") {
			c.host.mu.Lock()
			stalled := now.Before(c.host.stalled)
			c.host.mu.Unlock()
			if stalled || c.current.Load() == nil || slices.ContainsFunc(c.host.open(true), func(l *simLink) bool { return l.mute.Load() }) {
				continue
			}
			w.mu.Lock()
			if n := len(c.there); n > 0 && now.Sub(c.there[n-1][1]) <= every {
				c.there[n-1][1] = now
			} else {
				c.there = append(c.there, [2]time.Time{now, now})
			}
			w.mu.Unlock()
		}
	}
}

// startReader starts a legacy client: it reads a stream, reports nothing, and comes
// back when it ends.
func (w *simWorld) startReader(ctx context.Context, channel string) {
	rt := &http.Transport{DialContext: w.front.balanced}
	w.wg.Go(func() {
		defer rt.CloseIdleConnections()
		for again := true; again; again = sleep(ctx, time.Second) {
			l := subscribe(ctx, rt, "http://relay.test/subscribe/"+channel+"/")
			<-l.done
			w.mu.Lock()
			w.reads = append(w.reads, l)
			w.mu.Unlock()
		}
	})
}

// Targets.

// simDoes is what a target may do.
var simDoes = []struct {
	status      int
	least, most time.Duration // until it answers
}{{200, 0, 20 * time.Millisecond}, {200, 0, 3 * time.Second}, {503, 0, 0}, {500, 0, 0}, {200, time.Minute, time.Minute}, {200, 0, 0}}

const simRefuses = 5 // new connections

// simTarget is the target of one channel.
type simTarget struct {
	w    *simWorld
	host *simHost
	web  *http.Server
	does atomic.Int32 // of simDoes
}

func (w *simWorld) startTarget(channel string) {
	s := &simTarget{w: w, host: w.newHost("target of " + channel)}
	s.web = &http.Server{Handler: s}
	w.targets[channel] = s
	w.wg.Go(func() { s.web.Serve(s.host) })
}

func (s *simTarget) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	w, does := s.w, simDoes[s.does.Load()]
	if !sleep(r.Context(), does.least+w.upTo(does.most-does.least)) || r.Context().Err() != nil {
		return
	}
	id := r.Header.Get("X-Relay-Event-Id")
	w.mu.Lock()
	host := w.hosts[r.RemoteAddr]
	i := slices.IndexFunc(w.clients, func(c *simClient) bool { return c.host == host })
	j := slices.IndexFunc(w.posts, func(p *simPost) bool { return p.path == r.URL.Path })
	if i < 0 || j < 0 {
		w.t.Errorf("target got %s of %s", r.URL.Path, r.RemoteAddr)
	} else if !w.clients[i].dead.Load() {
		w.posts[j].calls = append(w.posts[j].calls, simCall{w.clients[i], does.status})
		w.posts[j].id = id
	}
	w.mu.Unlock()
	w.note("target answers %d to %s for event=%s", does.status, host.name, id)
	rw.WriteHeader(does.status)
}

// post sends one webhook and notes the answer.
func (w *simWorld) post(p *simPost) {
	w.mu.Lock()
	p.began = time.Now()
	w.posts = append(w.posts, p)
	w.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	rt := &http.Transport{DisableKeepAlives: true, DialContext: w.front.balanced}
	o := post(ctx, rt, "POST", "http://relay.test"+p.path, strings.Repeat("x", p.size))
	w.mu.Lock()
	defer w.mu.Unlock()
	p.ended, p.status = time.Now(), o.status
	if id := o.header.Get("X-Relay-Event-Id"); id != "" {
		p.id = id
	}
}

// One run.

// newSimWorld is a world with targets and nothing else.
func newSimWorld(t *testing.T, seed uint64) *simWorld {
	w := &simWorld{
		t: t, plan: rand.New(rand.NewPCG(seed, 1)), chances: rand.New(rand.NewPCG(seed, 2)), began: time.Now(),
		modes:  byChannel[string]{Default: modeAccept, Named: map[string]string{"status": modeStatus, "response": modeResponse}},
		buffer: 16 << 20, concurrency: 32, latency: 5 * time.Millisecond,
		hosts: map[string]*simHost{}, targets: map[string]*simTarget{}, events: map[string]*simEvent{},
	}
	w.redisDelay, w.lanes = 5*time.Millisecond, map[string]time.Time{}
	w.startRedis()
	w.front = w.newHost("front")
	for _, channel := range simChannels {
		w.startTarget(channel)
	}
	return w
}

var simChannels = []string{"accept", "status", "response"}

// close ends everything that is left.
func (w *simWorld) close() {
	for _, c := range w.runs("") {
		w.wg.Go(c.stop)
	}
	time.Sleep(simHandler + time.Second)
	for _, r := range w.up() {
		w.wg.Go(r.stop)
	}
	time.Sleep(2 * simHandler)
	for _, s := range w.targets {
		s.web.Close()
		s.host.crash()
	}
	w.front.crash()
	w.redis.crash()
	w.wg.Wait()
	time.Sleep(time.Minute) // timers
}

func simulate(t *testing.T, seed uint64) {
	w := newSimWorld(t, seed)
	r := w.plan
	between := func(a, b int) int { return a + r.IntN(b-a+1) }
	within := func(a, b time.Duration) time.Duration { return a + time.Duration(r.Int64N(int64(b-a)+1)) }
	w.kind = int(seed % 5)
	w.buffer = []int64{16 << 20, 1 << 20, 64 << 10}[r.IntN(3)]
	w.concurrency = []int64{32, 4, 1}[r.IntN(3)]
	w.latency = within(0, 20*time.Millisecond)
	w.delay = within(0, 2*time.Second)
	w.redisDelay = within(0, []time.Duration{2 * time.Millisecond, 20 * time.Millisecond, 200 * time.Millisecond}[r.IntN(3)])
	if r.IntN(4) == 0 {
		w.maxAge = within(5*time.Second, 20*time.Second)
	}
	for range between(1, 3) {
		w.startReplica()
	}
	time.Sleep(3 * time.Second) // time to know each other
	for _, channel := range simChannels {
		for range between(1, 2) {
			w.startClient(channel)
		}
	}
	watching, settled := context.WithCancel(context.Background())
	if w.kind <= simNetwork && r.IntN(3) == 0 {
		w.startReader(watching, "accept")
	}
	w.wg.Go(func() { w.watch(watching) })
	time.Sleep(2 * time.Second)

	length, at := within(20*time.Second, 50*time.Second), time.Duration(0)
	for i := range between(50, 150) {
		p := &simPost{channel: simChannels[max(0, r.IntN(5)-2)], size: between(0, 200)}
		p.path, p.mode = fmt.Sprintf("/webhooks/%s/%d", p.channel, i), w.modes.of(p.channel)
		if r.IntN(8) == 0 {
			p.size = between(10_000, 100_000)
		}
		if r.IntN(2) == 0 { // otherwise it is one of a burst
			at = within(0, length)
		}
		time.AfterFunc(at, func() { w.post(p) })
	}
	for range between(2, 12) {
		channel := simChannels[r.IntN(3)]
		d, gap := within(0, 6*time.Second), within(-2*time.Second, 4*time.Second)
		if r.IntN(8) == 0 {
			gap = within(simHoldTime/2, 2*simHoldTime)
		}
		pick, coin := r.IntN(100), r.IntN(2)
		client := func() *simClient {
			if list := w.runs(channel); len(list) > 0 {
				return list[pick%len(list)]
			}
			return w.startClient(channel)
		}
		replica := func() *simReplica {
			if list := w.up(); len(list) > 0 {
				return list[pick%len(list)]
			}
			return w.startReplica()
		}
		// replaced runs stop, and starts another one so much later, or earlier.
		replaced := func(stop, start func()) {
			time.AfterFunc(max(gap, 0), start)
			time.AfterFunc(max(-gap, 0), stop)
		}
		newClient, newReplica := func() { w.startClient(channel) }, func() { w.startReplica() }
		faults := []func(){
			func() {},
			func() { replaced(client().stop, newClient) },
			func() { replaced(replica().stop, newReplica) },
			func() {
				does := &w.targets[channel].does
				does.Store(int32(pick%simRefuses + 1))
				time.AfterFunc(d, func() { does.Store(0) })
			},
			func() {
				h := client().host
				if coin == 0 {
					h = replica().host
				}
				w.note("%s is cut, silent for %v or stalls: %d", h.name, d, pick%3)
				switch pick % 3 {
				case 0:
					h.silence(0)
				case 1:
					h.silence(d)
				case 2:
					h.stall(d / 2) // a target's answer still comes in time
				}
			},
			func() {
				from := w.up()
				if coin == 0 {
					from = []*simReplica{replica()}
				}
				for _, r := range from {
					w.note("the bus of %s is away for %v", r.who, d/2)
					r.away(d/2 + w.upTo(time.Second))
				}
			},
			func() { replaced(client().crash, newClient) },
			func() { replaced(replica().crash, newReplica) },
		}
		most := []int{0, 2, 3, 5, 7}[w.kind]
		time.AfterFunc(within(0, length), faults[between(min(1, most), most)])
	}
	time.Sleep(length)
	time.Sleep(8 * time.Second) // until the last fault is over
	w.note("faults end")
	if len(w.up()) == 0 {
		w.startReplica()
	}
	for _, channel := range simChannels {
		w.targets[channel].does.Store(0)
		if len(w.runs(channel)) == 0 {
			w.startClient(channel)
		}
	}
	time.Sleep(2*simHoldTime + simResponse + simRetry + simHandler + 2*returnTime)
	settled()
	w.check(true)
	w.close()
	w.check(false)
	if testing.Verbose() && *simCount == 1 {
		t.Log("\n" + w.log.String())
	}
}

// check is what must hold; live while processes still run.
func (w *simWorld) check(live bool) {
	w.mu.Lock()
	replicas := slices.Clone(w.replicas)
	w.mu.Unlock()
	crashed := false
	for _, r := range replicas {
		if crashed = crashed || r.dead.Load(); r.dead.Load() {
			continue
		}
		s, n := r.server, 0
		s.mu.Lock()
		for _, l := range s.lines {
			n += l.holds + len(l.waiting) + len(l.missed)
			if l.courier {
				n++
			}
		}
		if live && !r.over.Load() {
			n += len(s.awaited) + len(s.returns)
		}
		if n += len(s.having) + len(s.holds); n > 0 || s.strange != 0 || s.budget.Used() != 0 {
			w.failed("", "%s still keeps %d things, %d bytes of strangers, %d bytes in all", r.who, n, s.strange, s.budget.Used())
		}
		s.mu.Unlock()
	}
	if live {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, record := range w.log.lines("webhook given up") {
		w.event(record["event"].(string)).gaveUp = true
	}
	lost, counted := int64(0), int64(0)
	for _, record := range w.log.lines("webhook lost") {
		e := w.event(record["event"].(string))
		e.lost, e.by, e.when = record["reason"].(string), record["who"].(string), must(time.Parse(time.RFC3339Nano, record["time"].(string)))
		lost++
	}
	for _, r := range replicas {
		counted += total(r.server.Lost)
	}
	if counted != lost && !crashed {
		w.failed("", "%d are counted as lost, %d are", counted, lost)
	}
	for _, p := range w.posts {
		w.judge(p)
	}
	times := map[string]int{}
	for _, l := range w.reads {
		for _, m := range l.got("message") {
			if times[m.id]++; times[m.id] > 1 && w.kind < simNetwork {
				w.failed(m.id, "a legacy reader got an event %d times", times[m.id])
			}
		}
	}
}

// judge checks what became of p. It needs mu.
func (w *simWorld) judge(p *simPost) {
	e := w.event(p.id)
	by := p.successes()
	arrived := slices.ContainsFunc(p.calls, func(c simCall) bool { return !slices.Contains(passing, c.status) })
	switch {
	case p.status/100 == 2 && p.mode != modeAccept && len(by) == 0:
		w.failed(p.id, "%s was answered %d without the target", p.path, p.status)
	case p.status/100 == 2 && p.mode == modeAccept && !arrived:
		if why := w.excuse(p, e); why != "" {
			w.failed(p.id, "%s was accepted and is missing: %s", p.path, why)
		}
	case arrived && e.lost != "" && w.kind < simCrashes && !(w.kind == simNetwork && e.lost == "shutdown"): // without the bus no report reaches it
		w.failed(p.id, "%s is called lost (%s), and arrived", p.path, e.lost)
	case p.status/100 != 2 && w.kind == simCalm:
		w.failed(p.id, "%s was answered %d, and nothing is wrong", p.path, p.status)
	}
	together := true // all the time
	for c, n := range by {
		together = together && c.born.Before(p.began) && (c.stopped.IsZero() || c.stopped.After(p.ended))
		if n > 1 {
			w.failed(p.id, "%s was forwarded %d times by %s", p.path, n, c.who)
		}
	}
	if len(by) < 2 || together || e.handed || w.kind >= simNetwork {
		return
	}
	for _, given := range e.given {
		missing := maps.Clone(by)
		maps.DeleteFunc(missing, func(c *simClient, _ int) bool { return slices.Contains(given, c.name) })
		if len(missing) == 0 {
			return // all were there when it was published
		}
	}
	w.failed(p.id, "%s was forwarded by %d clients that were never there together", p.path, len(by))
}

// excuse is empty when the accepted p may be missing, or tells why it may not. It
// needs mu.
func (w *simWorld) excuse(p *simPost, e *simEvent) string {
	for _, r := range w.replicas {
		if r.dead.Load() && slices.Contains(e.holder, r.who) {
			return ""
		}
	}
	for _, c := range w.clients {
		if c.had[p.id] {
			return ""
		}
	}
	given := slices.Concat(slices.Collect(maps.Values(e.given))...)
	switch {
	case e.gaveUp, len(given) > 0 && !slices.ContainsFunc(given, func(name string) bool { return name != "" }): // legacy readers alone
		return ""
	case e.handed && w.kind >= simNetwork: // on the way to a replica that had lost the bus
		return ""
	case e.lost == "":
		return "nobody knows why"
	}
	for _, r := range w.replicas {
		if r.who == e.by && !r.leaves.IsZero() && !r.leaves.After(e.when) && e.lost != "no_client" {
			if w.kind < simNetwork && !r.last(e.when) {
				return e.lost
			}
			return ""
		}
	}
	for _, c := range w.clients { // was there really nobody?
		for _, there := range c.there {
			from, to := max(there[0].Sub(w.began), e.when.Sub(w.began)-simHoldTime), min(there[1].Sub(w.began), e.when.Sub(w.began))
			if c.channel == p.channel && to-from > 3*time.Second {
				return fmt.Sprintf("%s, although %s was there from %s to %s", e.lost, c.who, from, to)
			}
		}
	}
	return ""
}

// failed tells what is wrong, and all that was said of the event.
func (w *simWorld) failed(id, format string, args ...any) {
	w.t.Helper()
	w.t.Errorf("kind %d: %s", w.kind, fmt.Sprintf(format, args...))
	if id == "" || testing.Verbose() && *simCount == 1 {
		return
	}
	for line := range strings.Lines(w.log.String()) {
		if strings.Contains(line, id) || !strings.Contains(line, "event") && !strings.Contains(line, "hears") { // or is of the world around it
			w.t.Log(line)
		}
	}
}

// Scenarios: what chance finds too seldom, in the same world.

// inSim runs f in a world with one replica and checks the world afterwards.
func inSim(t *testing.T, f func(t *testing.T, w *simWorld, r *simReplica)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newSimWorld(t, 1)
		w.kind = simRolling
		r := w.startReplica()
		time.Sleep(time.Second)
		f(t, w, r)
		w.close()
		w.check(false)
	})
}

// send posts n webhooks of size bytes to channel, one after the other.
func (w *simWorld) send(channel string, n, size int) (posts []*simPost) {
	for range n {
		p := &simPost{channel: channel, mode: w.modes.of(channel), size: size, path: fmt.Sprintf("/webhooks/%s/%d", channel, len(w.posts))}
		w.post(p)
		posts = append(posts, p)
	}
	return posts
}

// want fails unless each of posts had n successes at the target, all by c unless
// that is nil.
func (w *simWorld) want(posts []*simPost, n int, c *simClient) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range posts {
		got := 0
		for client, n := range p.successes() {
			if c == nil || c == client {
				got += n
			}
		}
		if p.status != http.StatusOK || got != n {
			w.failed(p.id, "%s: answered %d, forwarded %d times, want %d", p.path, p.status, got, n)
		}
	}
}

// TestSimulationHandOver: what nobody took reaches, by way of another replica, the
// client that comes later.
func TestSimulationHandOver(t *testing.T) {
	inSim(t, func(t *testing.T, w *simWorld, r *simReplica) {
		posts := w.send("accept", 3, 10)
		w.startReplica()
		time.Sleep(time.Second)
		r.stop()
		w.startClient("accept")
		time.Sleep(5 * time.Second)
		w.want(posts, 1, nil)
	})
}

// TestSimulationBackUnderItsName: a client whose stream fell silent gets what came
// meanwhile, although another client has reported it.
func TestSimulationBackUnderItsName(t *testing.T) {
	inSim(t, func(t *testing.T, w *simWorld, r *simReplica) {
		first, second := w.startClient("accept"), w.startClient("accept")
		time.Sleep(time.Second)
		first.host.silence(3 * time.Second)
		posts := w.send("accept", 5, 10)
		time.Sleep(2 * time.Second)
		w.want(posts, 1, second)
		w.want(posts, 0, first)
		time.Sleep(5 * time.Second)
		w.want(posts, 1, second)
		w.want(posts, 1, first)
	})
}

// TestSimulationAgain: however often the bus goes away, one client forwards
// everything once.
func TestSimulationAgain(t *testing.T) {
	for range 6 {
		inSim(t, func(t *testing.T, w *simWorld, r *simReplica) {
			w.kind = simNetwork
			other := w.startReplica()
			time.Sleep(time.Second)
			w.startClient("accept")
			w.startClient("status")
			time.Sleep(time.Second)
			var posts []*simPost
			for range 10 {
				posts = slices.Concat(posts, w.send("accept", 5, 10), w.send("status", 2, 10))
				r.away(300 * time.Millisecond)
				other.away(w.upTo(600 * time.Millisecond))
			}
			time.Sleep(10 * time.Second)
			w.want(posts, 1, nil)
		})
	}
}
