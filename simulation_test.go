package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
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
	front *simHost // where senders and legacy readers live
	wg    sync.WaitGroup

	buffer, concurrency int64
	maxAge              time.Duration
	latency             time.Duration // longest, of a connection
	delay               time.Duration // longest, of a message in Redis

	mu       sync.Mutex
	chances  *rand.Rand            // guarded by mu, like all below: chooses delays
	lines    []string              // all that was logged
	hosts    map[string]*simHost   // by address
	replicas []*simReplica         // all there ever were
	clients  []*simClient          // likewise
	readers  []*simReader          // likewise
	targets  map[string]*simTarget // by channel
	posts    []*simPost
	events   map[string]*simEvent // by id
	left     map[string]time.Time // when the last stream of a replica and channel ended
	lanes    map[string]time.Time // when the last message of each arrives
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

// simCall is one answer of a target.
type simCall struct {
	client *simClient
	status int
}

// simEvent is what became known of one event on its way.
type simEvent struct {
	given  map[string][]string // client names ("": legacy) by publication
	holder []string            // replicas that held it
	lost   string              // the reason, when a replica said so
	by     string              // who said it
	when   time.Time
	gaveUp bool // a client did
	handed bool // a replica handed it to another
}

func (w *simWorld) event(id string) *simEvent {
	e := w.events[id]
	if e == nil {
		e = &simEvent{given: map[string][]string{}, holder: []string{replicaOf(id)}}
		w.events[id] = e
	}
	return e
}

func (w *simWorld) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lines = append(w.lines, fmt.Sprintf("%8.3f  %s", time.Since(w.began).Seconds(), fmt.Sprintf(format, args...)))
}

func (w *simWorld) upTo(most time.Duration) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Duration(w.chances.Int64N(int64(most) + 1))
}

func (w *simWorld) chance(p float64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.chances.Float64() < p
}

// simLog is a log that the world reads.
type simLog struct {
	w     *simWorld
	who   string
	dead  *atomic.Bool // whoever is says nothing any more
	attrs []slog.Attr
}

func (l simLog) Enabled(context.Context, slog.Level) bool { return true }
func (l simLog) WithGroup(string) slog.Handler            { return l }
func (l simLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	l.attrs = slices.Concat(l.attrs, attrs)
	return l
}

func (l simLog) Handle(_ context.Context, r slog.Record) error {
	if l.dead.Load() {
		return nil
	}
	var b strings.Builder
	fields := map[string]string{}
	add := func(a slog.Attr) bool {
		fields[a.Key] = a.Value.String()
		fmt.Fprintf(&b, " %s=%s", a.Key, a.Value)
		return true
	}
	for _, a := range l.attrs {
		add(a)
	}
	r.Attrs(add)
	l.w.note("%s: %s%s", l.who, r.Message, b.String())
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	switch r.Message {
	case "webhook lost":
		e := l.w.event(fields["event"])
		e.lost, e.by, e.when = fields["reason"], l.who, time.Now()
	case "subscriber gone":
		l.w.left[l.who+fields["channel"]] = time.Now()
	case "webhook given up":
		l.w.event(fields["event"]).gaveUp = true
	}
	return nil
}

// Connections: pairs of pipes with a carrier between them, which delays, stalls
// or loses what it carries.

// simHost is a machine: it listens, and everything that it is connected to goes
// with it.
type simHost struct {
	w     *simWorld
	name  string
	addr  *net.TCPAddr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once

	mu    sync.Mutex
	down  bool                  // guarded by mu, like all below
	links map[*simLink]struct{} // its connections
	thaw  chan struct{}         // closed when it no longer stalls; nil: it does not
}

func (w *simWorld) newHost(name string) *simHost {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(w.hosts) + 1
	h := &simHost{
		w: w, name: name, addr: &net.TCPAddr{IP: net.IPv4(10, 0, byte(n>>8), byte(n)), Port: 4711},
		conns: make(chan net.Conn), done: make(chan struct{}), links: map[*simLink]struct{}{},
	}
	w.hosts[h.addr.String()] = h
	return h
}

func (h *simHost) Addr() net.Addr { return h.addr }

func (h *simHost) Accept() (net.Conn, error) {
	select {
	case conn := <-h.conns:
		return conn, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *simHost) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

// simConn is a connection that knows where it came from.
type simConn struct {
	net.Conn
	from net.Addr
}

func (c simConn) RemoteAddr() net.Addr { return c.from }

// simLink is one connection between two hosts.
type simLink struct {
	hosts [2]*simHost
	ends  [4]net.Conn
	over  chan struct{}
	once  sync.Once
	left  atomic.Int32
	mute  atomic.Bool // nothing arrives any more, not even the end
	room  int         // chunks under way before a writer has to wait: who writes to Redis holds a lock
}

var errSimRefused = errors.New("connection refused")

func (h *simHost) dial(ctx context.Context, to *simHost) (net.Conn, error) {
	if to == nil || !sleep(ctx, h.w.upTo(h.w.latency)) {
		return nil, errSimRefused
	}
	l := &simLink{hosts: [2]*simHost{h, to}, over: make(chan struct{})}
	if to == h.w.redis {
		l.room = 1 << 12
	}
	l.ends[0], l.ends[1] = net.Pipe()
	l.ends[2], l.ends[3] = net.Pipe()
	for _, host := range l.hosts {
		host.mu.Lock()
		if host.down {
			l.cut()
		}
		host.links[l] = struct{}{}
		host.mu.Unlock()
	}
	l.left.Store(2)
	go l.carry(l.ends[2], l.ends[1]) // both end with the connection
	go l.carry(l.ends[1], l.ends[2])
	select {
	case to.conns <- simConn{l.ends[3], h.addr}:
		return l.ends[0], nil
	case <-to.done:
	case <-ctx.Done():
	case <-l.over:
	}
	l.cut()
	return nil, errSimRefused
}

func (l *simLink) cut() {
	l.once.Do(func() {
		close(l.over)
		for _, end := range l.ends {
			end.Close()
		}
	})
}

func (l *simLink) carry(dst, src net.Conn) {
	defer func() {
		dst.Close()
		if l.left.Add(-1) == 0 {
			for _, h := range l.hosts {
				h.mu.Lock()
				delete(h.links, l)
				h.mu.Unlock()
			}
		}
	}()
	sent := make(chan []byte, l.room)
	go func() { // ends with src
		defer close(sent)
		for {
			buf := make([]byte, 16<<10)
			n, err := src.Read(buf)
			if sent <- buf[:n]; err != nil {
				return
			}
		}
	}()
	for chunk := range sent {
		passed := l.pass()
		for len(sent) > 0 { // what came meanwhile arrives together
			chunk = append(chunk, <-sent...)
		}
		if len(chunk) > 0 && passed {
			if _, err := dst.Write(chunk); err != nil { // what came the other way may still arrive
				for range sent {
				}
				return
			}
		}
	}
	if l.mute.Load() {
		<-l.over
	}
}

// pass waits as long as it takes to pass, and reports whether that is possible.
func (l *simLink) pass() bool {
	time.Sleep(l.hosts[0].w.upTo(l.hosts[0].w.latency))
	for _, h := range l.hosts {
		h.mu.Lock()
		thaw := h.thaw
		h.mu.Unlock()
		if thaw != nil {
			select {
			case <-thaw:
			case <-l.over:
			}
		}
	}
	return !l.mute.Load()
}

// all lists the connections of h.
func (h *simHost) all() (links []*simLink) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for l := range h.links {
		links = append(links, l)
	}
	return links
}

// crash breaks all of h for good, and who is connected sees that unless the
// connection is mute.
func (h *simHost) crash() {
	h.mu.Lock()
	h.down = true
	h.mu.Unlock()
	h.Close()
	for _, l := range h.all() {
		if !l.mute.Load() {
			l.cut()
		}
	}
}

// silence breaks all connections of h without telling anybody before d is over.
func (h *simHost) silence(d time.Duration) {
	for _, l := range h.all() {
		l.mute.Store(true)
		time.AfterFunc(d, l.cut)
	}
}

// stall holds everything up for d.
func (h *simHost) stall(d time.Duration) {
	thaw := make(chan struct{})
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.thaw == nil {
		h.thaw = thaw
		time.AfterFunc(d, func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.thaw = nil
			close(thaw)
		})
	}
}

// Redis, which is one of the tests, behind the same connections.

const simPrefix = "relay:"

// startRedis starts it. It keeps the order only of what one replica sends to one
// name: less than a true one.
func (w *simWorld) startRedis() {
	w.redis = w.newHost("redis")
	newFakeRedis(w.t, w.redis, w.overhear).later = func(lane string, f func()) {
		w.mu.Lock()
		defer w.mu.Unlock()
		due := time.Now().Add(time.Duration(w.chances.Int64N(int64(w.delay) + 1)))
		if last := w.lanes[lane]; !due.After(last) {
			due = last.Add(1)
		}
		w.lanes[lane] = due
		time.AfterFunc(time.Until(due), f)
	}
}

// overhear notes what replicas say to Redis.
func (w *simWorld) overhear(command []string) string {
	if command[0] != "PUBLISH" {
		return ""
	}
	name, data := strings.TrimPrefix(command[1], simPrefix), []byte(command[2])
	if name[0] != '@' {
		if e, err := openEvent(name, data); err == nil {
			w.note("%s publishes event=%s round=%d only=%s", e.Holder, e.ID, e.Round, e.Only)
		}
		return ""
	}
	for len(data) > 0 {
		var wire string
		var err error
		if data, err = cutFields(data, &wire); err == nil {
			var sig Signal
			if sig, err = openSignal([]byte(wire)); err == nil {
				w.told(&sig)
			}
		}
		if err != nil {
			w.t.Error(err)
			return ""
		}
	}
	return ""
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

// Processes.

// simReplica is one server process.
type simReplica struct {
	w      *simWorld
	name   string
	host   *simHost
	hub    *Hub
	server *Server
	bus    *RedisBus
	web    *http.Server
	dead   atomic.Bool   // it has crashed
	over   atomic.Bool   // nobody may stop it any more
	ended  chan struct{} // closed when nothing of it is left
	finish func()

	back                        time.Time // guarded by w.mu: when it can reach Redis again
	born, stopped, leaves, gone time.Time // guarded by w.mu: when it started, was asked to stop, began to shut down, and left the bus
}

func (w *simWorld) startReplica() *simReplica {
	r := &simReplica{w: w, name: newReplica(), ended: make(chan struct{})}
	r.host = w.newHost(r.name)
	log := slog.New(simLog{w: w, who: r.name, dead: &r.dead})
	r.hub = &Hub{Limits: Limits{Subscribers: 1000, PerAddress: 1000, Buffer: w.buffer}, Budget: &Budget{Limit: 64 << 20}}
	r.bus = NewRedisBus(RedisOptions{
		Server: RedisServer{Addr: "redis:6379"}, Prefix: simPrefix, MaxAttempts: -1,
		Backoff: Backoff{Initial: 100 * time.Millisecond, Max: time.Second, Factor: 2, Jitter: true},
	}, r.name, r.hub, log)
	r.bus.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
		w.mu.Lock()
		back := r.back
		w.mu.Unlock()
		if time.Now().Before(back) {
			return nil, errSimRefused
		}
		return r.host.dial(ctx, w.redis)
	}
	var err error
	r.server, err = NewServer(ServerOptions{
		Replica: r.name, MaxPayload: 3 << 20, Heartbeat: time.Second, HoldTime: simHoldTime, StreamMaxAge: w.maxAge,
		HandlerTimeout: simHandler, Modes: w.modes, Timeouts: byChannel[time.Duration]{Default: simResponse},
	}, r.hub, r.bus, log)
	if err != nil {
		w.t.Fatal(err)
	}
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
		r.note(&r.gone)
		r.host.crash()
		close(r.ended)
	}
	w.mu.Lock()
	r.born = time.Now()
	w.replicas = append(w.replicas, r)
	w.mu.Unlock()
	w.note("%s starts", r.name)
	return r
}

// hears notes what the replica is told.
func (r *simReplica) hears(sig *Signal) {
	switch {
	case sig.From == r.name && sig.To == r.name:
		r.w.told(sig)
	case sig.Kind == signalHand:
		r.w.mu.Lock()
		e := r.w.event(sig.Event)
		e.holder = append(e.holder, r.name)
		r.w.mu.Unlock()
	}
	about := " of " + sig.Event
	if sig.Event == "" {
		about = " subscriber=" + sig.Subscriber
	}
	r.w.note("%s hears %s%s client=%s from=%s round=%d given=%v", r.name, sig.Kind, about, sig.Client, sig.From, sig.Round, sig.Given)
}

// away takes Redis from r for d. Redis may see that a little later than r, or both
// do.
func (r *simReplica) away(d time.Duration) {
	r.w.mu.Lock()
	r.back = time.Now().Add(d)
	r.w.mu.Unlock()
	for _, l := range r.host.all() {
		if l.hosts[1] != r.w.redis {
			continue
		}
		if r.w.chance(0.5) {
			l.mute.Store(true)
			time.AfterFunc(r.w.upTo(simUnseen), l.cut)
		}
		if r.w.chance(0.5) {
			l.ends[0].Close()
		} else if !l.mute.Load() {
			l.cut()
		}
	}
}

const simUnseen = 1500 * time.Millisecond

// stop is SIGTERM, as runServer takes it; delay is the shutdown delay.
func (r *simReplica) stop(delay time.Duration) {
	if r.over.Swap(true) {
		return
	}
	r.w.note("%s is stopped, delay %v", r.name, delay)
	r.server.Drain()
	r.note(&r.stopped)
	time.Sleep(delay)
	r.note(&r.leaves)
	finish, cancel := context.WithTimeout(context.Background(), simHandler)
	defer cancel()
	r.server.Shutdown()
	if r.web.Shutdown(finish) != nil {
		r.web.Close()
	}
	r.bus.Flush(finish)
	r.finish()
	r.w.note("%s has ended", r.name)
}

// crash ends the process at once. What is left of it in the bubble reaches nobody.
func (r *simReplica) crash() {
	if r.over.Swap(true) {
		return
	}
	r.w.note("%s crashes", r.name)
	r.note(&r.stopped)
	r.dead.Store(true)
	r.away(time.Hour)
	r.host.crash()
	r.server.Shutdown()
	r.web.Close()
	r.finish()
}

func (r *simReplica) note(at *time.Time) {
	r.w.mu.Lock()
	defer r.w.mu.Unlock()
	*at = time.Now()
}

// last reports whether r was stopped when no other replica was there. It needs w.mu.
func (r *simReplica) last(at time.Time) bool {
	return !r.stopped.IsZero() && r.stopped.Before(at) && !slices.ContainsFunc(r.w.replicas, func(o *simReplica) bool {
		return o != r && o.born.Add(time.Second).Before(at) && (o.stopped.IsZero() || o.stopped.After(at))
	})
}

// up lists the replicas that nobody has stopped.
func (w *simWorld) up() (list []*simReplica) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.replicas {
		if !r.over.Load() {
			list = append(list, r)
		}
	}
	return list
}

// balance chooses the replica for a new connection, as a balancer that probes does:
// mostly one that is ready.
func (w *simWorld) balance() *simHost {
	w.mu.Lock()
	all := slices.Clone(w.replicas)
	w.mu.Unlock()
	late := w.chance(0.1)
	var ready, others []*simHost
	for _, r := range all {
		select {
		case <-r.ended:
			continue
		default:
		}
		switch {
		case r.dead.Load():
		case r.server.Check(context.Background()) == nil:
			ready = append(ready, r.host)
		default:
			others = append(others, r.host)
		}
	}
	if len(ready) == 0 || late && len(others) > 0 {
		ready = others
	}
	if len(ready) == 0 {
		return nil
	}
	return ready[w.upTo(time.Duration(len(ready)-1))]
}

// simClient is one client process.
type simClient struct {
	*Client
	w       *simWorld
	channel string
	host    *simHost
	dead    atomic.Bool // it has crashed
	over    atomic.Bool // nobody may stop it any more
	cancel  func()
	done    chan struct{}
	born    time.Time
	stopped time.Time       // guarded by w.mu: when it was asked to
	had     map[string]bool // guarded by w.mu: events that it may have reported and had not forwarded when it crashed
	there   []simInterval   // guarded by w.mu: when it had a stream
}

type simInterval struct{ from, to time.Time }

func (w *simWorld) startClient(channel string) *simClient {
	c := &simClient{w: w, channel: channel, done: make(chan struct{}), born: time.Now()}
	w.mu.Lock()
	n := len(w.clients) + 1
	w.mu.Unlock()
	c.host = w.newHost(fmt.Sprintf("client %d", n))
	source, _ := url.Parse("http://relay.test/subscribe/" + channel + "/")
	target, _ := url.Parse("http://target.test")
	c.Client = NewClient(ClientOptions{
		Source: source, Target: target, ReconnectInterval: time.Second, HandlerTimeout: simHandler,
		Timeout: 5 * time.Second, RetryWindow: simRetry, Concurrency: int(w.concurrency), RetryOn: passing,
	}, slog.New(simLog{w: w, who: c.host.name, dead: &c.dead}))
	c.source.Proxy, c.target.Proxy = nil, nil
	c.source.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return c.host.dial(ctx, w.balance()) }
	c.target.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		to := w.targets[channel]
		if to.kind() == simRefuses {
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
	w.clients = append(w.clients, c)
	w.mu.Unlock()
	w.note("%s starts for %s as %s", c.host.name, channel, c.name)
	return c
}

// stop is SIGTERM.
func (c *simClient) stop() {
	if !c.over.Swap(true) {
		c.w.note("%s is stopped", c.host.name)
		c.w.mu.Lock()
		c.stopped = time.Now()
		c.w.mu.Unlock()
		c.cancel()
		<-c.done
		c.w.note("%s has ended", c.host.name)
	}
}

func (c *simClient) crash() {
	if c.over.Swap(true) {
		return
	}
	c.w.note("%s crashes", c.host.name)
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

// runs lists the clients of channel that nobody has stopped.
func (w *simWorld) runs(channel string) (list []*simClient) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.clients {
		if !c.over.Load() && (channel == "" || c.channel == channel) {
			list = append(list, c)
		}
	}
	return list
}

// watch notes which clients are there, until stop is closed.
func (w *simWorld) watch(stop <-chan struct{}) {
	const every = 100 * time.Millisecond
	for sleepUntil(stop, every) {
		now := time.Now()
		for _, c := range w.runs("") {
			c.host.mu.Lock()
			hindered := c.host.thaw != nil
			for l := range c.host.links {
				hindered = hindered || l.mute.Load()
			}
			c.host.mu.Unlock()
			if c.current.Load() == nil || hindered {
				continue
			}
			w.mu.Lock()
			if n := len(c.there); n > 0 && now.Sub(c.there[n-1].to) <= every {
				c.there[n-1].to = now
			} else {
				c.there = append(c.there, simInterval{now, now})
			}
			w.mu.Unlock()
		}
	}
}

func sleepUntil(stop <-chan struct{}, d time.Duration) bool {
	select {
	case <-stop:
		return false
	case <-time.After(d):
		return true
	}
}

// simReader is a legacy client: it reads a stream, reports nothing, and comes back
// when it ends.
type simReader struct {
	channel string
	got     map[string]int // guarded by w.mu: events by id
}

func (w *simWorld) startReader(ctx context.Context, channel string) {
	r := &simReader{channel: channel, got: map[string]int{}}
	w.mu.Lock()
	w.readers = append(w.readers, r)
	w.mu.Unlock()
	rt := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return w.front.dial(ctx, w.balance()) }}
	w.wg.Go(func() {
		defer rt.CloseIdleConnections()
		for ctx.Err() == nil {
			req, _ := http.NewRequestWithContext(ctx, "GET", "http://relay.test/subscribe/"+channel+"/", nil)
			if resp, err := rt.RoundTrip(req); err == nil {
				for p := newParser(resp.Body); ; {
					m, err := p.next()
					if err != nil {
						break
					}
					if m.name == "message" {
						w.mu.Lock()
						r.got[m.id]++
						w.mu.Unlock()
					}
				}
				resp.Body.Close()
			}
			sleep(ctx, time.Second)
		}
	})
}

// Targets.

// What a target may do.
const (
	simAnswers = iota // 200
	simSlow           // 200, after up to 3 s
	simBusy           // 503
	simBroken         // 500
	simHangs          // nothing
	simRefuses        // no connection
)

// simTarget is the target of one channel.
type simTarget struct {
	w    *simWorld
	host *simHost
	web  *http.Server
	does atomic.Int32
}

func (s *simTarget) kind() int { return int(s.does.Load()) }

func (w *simWorld) startTarget(channel string) {
	s := &simTarget{w: w, host: w.newHost("target of " + channel)}
	s.web = &http.Server{Handler: s}
	w.targets[channel] = s
	w.wg.Go(func() { s.web.Serve(s.host) })
}

func (s *simTarget) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	w, kind, status := s.w, s.kind(), http.StatusOK
	switch kind {
	case simSlow:
		sleep(r.Context(), w.upTo(3*time.Second))
	case simBusy:
		status = http.StatusServiceUnavailable
	case simBroken:
		status = http.StatusInternalServerError
	case simHangs:
		sleep(r.Context(), time.Minute)
	case simAnswers:
		sleep(r.Context(), w.upTo(20*time.Millisecond))
	}
	if r.Context().Err() != nil {
		return
	}
	w.mu.Lock()
	host := w.hosts[r.RemoteAddr]
	i := slices.IndexFunc(w.clients, func(c *simClient) bool { return c.host == host })
	j := slices.IndexFunc(w.posts, func(p *simPost) bool { return p.path == r.URL.Path })
	if i < 0 || j < 0 {
		w.t.Errorf("target got %s of %s", r.URL.Path, r.RemoteAddr)
	} else if !w.clients[i].dead.Load() {
		w.posts[j].calls = append(w.posts[j].calls, simCall{w.clients[i], status})
		w.posts[j].id = r.Header.Get("X-Relay-Event-Id")
	}
	w.mu.Unlock()
	w.note("target answers %d to %s for event=%s", status, w.hosts[r.RemoteAddr].name, r.Header.Get("X-Relay-Event-Id"))
	rw.WriteHeader(status)
}

// post sends one webhook and notes the answer.
func (w *simWorld) post(p *simPost) {
	rt := &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return w.front.dial(ctx, w.balance()) },
	}
	w.mu.Lock()
	p.began = time.Now()
	w.posts = append(w.posts, p)
	w.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, "POST", "http://relay.test"+p.path, strings.NewReader(strings.Repeat("x", p.size)))
	req.GetBody = nil
	resp, err := rt.RoundTrip(req)
	w.mu.Lock()
	defer w.mu.Unlock()
	p.ended = time.Now()
	if err != nil {
		return
	}
	p.status = resp.StatusCode
	if id := resp.Header.Get("X-Relay-Event-Id"); id != "" {
		p.id = id
	}
	resp.Body.Close()
}

// One run.

// newWorld is a world with targets and nothing else.
func newSimWorld(t *testing.T, seed uint64) *simWorld {
	w := &simWorld{
		t: t, plan: rand.New(rand.NewPCG(seed, 1)), chances: rand.New(rand.NewPCG(seed, 2)), began: time.Now(),
		modes:  byChannel[string]{Default: modeAccept, Named: map[string]string{"status": modeStatus, "response": modeResponse}},
		buffer: 16 << 20, concurrency: 32, latency: 5 * time.Millisecond,
		hosts: map[string]*simHost{}, targets: map[string]*simTarget{}, events: map[string]*simEvent{}, left: map[string]time.Time{},
	}
	w.delay, w.lanes = 5*time.Millisecond, map[string]time.Time{}
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
		w.wg.Go(func() { r.stop(0) })
	}
	time.Sleep(2 * simHandler)
	for _, s := range w.targets {
		s.web.Close()
		s.host.crash()
	}
	w.front.crash()
	w.redis.crash()
	w.wg.Wait()
	time.Sleep(time.Minute) // carriers and timers
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
	w.delay = within(0, []time.Duration{2 * time.Millisecond, 20 * time.Millisecond, 200 * time.Millisecond}[r.IntN(3)])
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
	reading, unread := context.WithCancel(context.Background())
	if w.kind <= simNetwork && r.IntN(3) == 0 {
		w.startReader(reading, "accept")
	}
	watched := make(chan struct{})
	w.wg.Go(func() { w.watch(watched) })
	time.Sleep(2 * time.Second)

	type step struct {
		at time.Duration
		do func()
	}
	var steps []step
	length := within(20*time.Second, 50*time.Second)
	for i := range between(50, 150) {
		p := &simPost{channel: simChannels[max(0, r.IntN(5)-2)], size: between(0, 200)}
		p.path, p.mode = fmt.Sprintf("/webhooks/%s/%d", p.channel, i), w.modes.of(p.channel)
		if r.IntN(8) == 0 {
			p.size = between(10_000, 100_000)
		}
		at := within(0, length)
		if n := len(steps); n > 0 && r.IntN(2) == 0 { // a burst
			at = steps[n-1].at
		}
		steps = append(steps, step{at, func() { w.wg.Go(func() { w.post(p) }) }})
	}
	for range between(2, 12) {
		channel := simChannels[r.IntN(3)]
		d, gap := within(0, 6*time.Second), within(-2*time.Second, 4*time.Second)
		if r.IntN(8) == 0 {
			gap = within(simHoldTime/2, 2*simHoldTime)
		}
		pick, coin, delay := r.IntN(100), r.IntN(2), within(0, 2*time.Second)
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
		// replaced runs stop, and start so much later, or earlier.
		replaced := func(start, stop func()) {
			time.AfterFunc(max(gap, 0), start)
			time.AfterFunc(max(-gap, 0), func() { w.wg.Go(stop) })
		}
		faults := []func(){
			func() {},
			func() {
				c := client()
				replaced(func() { w.startClient(channel) }, c.stop)
			},
			func() {
				r := replica()
				replaced(func() { w.startReplica() }, func() { r.stop(delay) })
			},
			func() {
				s, kind := w.targets[channel], int32(pick%simRefuses+1)
				w.note("target of %s does %d for %v", channel, kind, d)
				s.does.Store(kind)
				time.AfterFunc(d, func() { s.does.Store(simAnswers) })
			},
			func() {
				h := client().host
				if coin == 0 {
					h = replica().host
				}
				switch pick % 3 {
				case 0:
					w.note("connections of %s are cut", h.name)
					for _, l := range h.all() {
						if l.hosts[1].web() {
							l.cut()
						}
					}
				case 1:
					w.note("%s falls silent for %v", h.name, d)
					for _, l := range h.all() {
						if l.hosts[1].web() {
							l.mute.Store(true)
							time.AfterFunc(d, l.cut)
						}
					}
				case 2:
					w.note("%s stalls for %v", h.name, d/2) // a target's answer still comes in time
					h.stall(d / 2)
				}
			},
			func() {
				if coin == 0 {
					r := replica()
					w.note("bus of %s is away for %v", r.name, d/2)
					r.away(d / 2)
					return
				}
				w.note("the bus is away for %v", d/2)
				for _, r := range w.up() {
					r.away(d/2 + w.upTo(time.Second))
				}
			},
			func() {
				c := client()
				replaced(func() { w.startClient(channel) }, c.crash)
			},
			func() {
				r := replica()
				replaced(func() { w.startReplica() }, r.crash)
			},
		}
		most := []int{0, 2, 3, 5, 7}[w.kind]
		fault := faults[between(min(1, most), most)]
		steps = append(steps, step{within(0, length), fault})
	}
	slices.SortStableFunc(steps, func(a, b step) int { return int(a.at - b.at) })
	start := time.Now()
	for _, s := range steps {
		time.Sleep(time.Until(start.Add(s.at)))
		s.do()
	}
	time.Sleep(8 * time.Second) // until the last fault is over
	w.note("faults end")
	if len(w.up()) == 0 {
		w.startReplica()
	}
	for _, channel := range simChannels {
		w.targets[channel].does.Store(simAnswers)
		if len(w.runs(channel)) == 0 {
			w.startClient(channel)
		}
	}
	time.Sleep(2*simHoldTime + simResponse + simRetry + simHandler + 2*returnTime)
	close(watched)
	unread()
	w.check(true)
	w.close()
	w.check(false)
	if testing.Verbose() && *simCount == 1 {
		t.Log("\n" + strings.Join(w.lines, "\n"))
	}
}

// web reports whether h is a replica's.
func (h *simHost) web() bool { return len(h.name) == replicaLength }

// check is what must hold; live while processes still run.
func (w *simWorld) check(live bool) {
	w.mu.Lock()
	replicas := slices.Clone(w.replicas)
	w.mu.Unlock()
	for _, r := range replicas {
		if r.dead.Load() {
			continue
		}
		if n, size := heldBy(r.server); n != 0 || size != 0 || r.server.strange != 0 {
			w.fail("", "%s still holds %d webhooks, %d bytes, %d of strangers", r.name, n, size, r.server.strange)
		}
		r.server.mu.Lock()
		for id := range r.server.holds {
			w.fail(id, "%s still holds %s", r.name, id)
			break
		}
		for channel, l := range r.server.lines {
			if l.holds != 0 || len(l.waiting) != 0 || len(l.missed) != 0 || l.courier {
				w.fail("", "%s has a line for %s with %d holds, %d wait, %d missed, courier %v", r.name, channel, l.holds, len(l.waiting), len(l.missed), l.courier)
			}
		}
		if len(r.server.having) != 0 || live && !r.over.Load() && len(r.server.awaited)+len(r.server.returns) != 0 {
			w.fail("", "%s has %d having, %d awaited, %d returns", r.name, len(r.server.having), len(r.server.awaited), len(r.server.returns))
		}
		r.server.mu.Unlock()
	}
	if live {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	lost := int64(0)
	for _, p := range w.posts {
		w.judge(p)
		if e := w.events[p.id]; e != nil && e.lost != "" && e.lost != "unknown_channel" {
			lost++
		}
	}
	counted := int64(0)
	for _, r := range w.replicas {
		counted += total(r.server.Lost) - r.server.Lost["unknown_channel"].Load()
		if r.dead.Load() {
			counted = lost // nobody can ask it
			break
		}
	}
	if counted != lost {
		w.failed("", "%d are counted as lost, %d are", counted, lost)
	}
	for _, r := range w.readers {
		for id, n := range r.got {
			if n > 1 && w.kind < simNetwork {
				w.failed(id, "a legacy reader got an event %d times", n)
			}
		}
	}
}

// judge checks what became of p. It needs mu.
func (w *simWorld) judge(p *simPost) {
	e := w.event(p.id)
	by := map[*simClient]int{}
	arrived, success := false, false
	for _, call := range p.calls {
		arrived = arrived || !slices.Contains(passing, call.status)
		if call.status/100 == 2 {
			success = true
			by[call.client]++
		}
	}
	switch {
	case p.status/100 == 2 && p.mode != modeAccept && !success:
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
	names, together := []string{}, true
	for c, n := range by {
		together = together && c.born.Before(p.began) && (c.stopped.IsZero() || c.stopped.After(p.ended))
		if names = append(names, c.name); n > 1 {
			w.failed(p.id, "%s was forwarded %d times by %s", p.path, n, c.host.name)
		}
	}
	if len(names) > 1 && !together && !e.handed && w.kind < simNetwork {
		for _, given := range e.given {
			if !slices.ContainsFunc(names, func(name string) bool { return !slices.Contains(given, name) }) {
				return // all were there when it was published
			}
		}
		w.failed(p.id, "%s was forwarded by %d clients that were never there together", p.path, len(names))
	}
}

// excuse is empty when the accepted p may be missing, or tells why it may not. It
// needs mu.
func (w *simWorld) excuse(p *simPost, e *simEvent) string {
	for _, r := range w.replicas {
		if r.dead.Load() && slices.Contains(e.holder, r.name) {
			return ""
		}
	}
	clients, legacy, leaving := 0, 0, false
	for _, given := range e.given {
		for _, name := range given {
			if name == "" {
				legacy++
			} else {
				clients++
			}
		}
	}
	for _, c := range w.clients {
		if c.had[p.id] {
			return ""
		}
	}
	switch {
	case e.gaveUp, clients == 0 && legacy > 0:
		return ""
	case e.handed && w.kind >= simNetwork: // on the way to a replica that had lost the bus
		return ""
	case e.lost == "":
		return "nobody knows why"
	}
	for _, r := range w.replicas {
		if r.name != e.by || r.leaves.IsZero() || r.leaves.After(e.when) || e.lost == "no_client" {
			continue
		}
		if leaving = true; !r.last(e.when) {
			continue
		}
		alone := !slices.ContainsFunc(w.replicas, func(o *simReplica) bool {
			return o != r && o.born.Before(e.when) && (o.gone.IsZero() || o.gone.After(r.leaves))
		})
		if alone && w.kind < simNetwork && !r.leaves.IsZero() && p.began.After(r.leaves.Add(20*time.Millisecond)) && p.began.After(w.left[r.name+p.channel]) {
			return "it was accepted by the last replica, which was leaving, for nobody"
		}
		return ""
	}
	if leaving {
		if w.kind < simNetwork {
			return e.lost
		}
		return ""
	}
	for _, c := range w.clients { // was there really nobody?
		for _, in := range c.there {
			from, to := in.from, in.to
			if begin := e.when.Add(-simHoldTime); from.Before(begin) {
				from = begin
			}
			if to.After(e.when) {
				to = e.when
			}
			if c.channel == p.channel && to.Sub(from) > 3*time.Second {
				return fmt.Sprintf("%s, although %s was there from %.3f to %.3f", e.lost, c.host.name, in.from.Sub(w.began).Seconds(), in.to.Sub(w.began).Seconds())
			}
		}
	}
	return ""
}

func (w *simWorld) fail(id, format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failed(id, format, args...)
}

// failed tells what is wrong, and all that was said of the event. It needs mu.
func (w *simWorld) failed(id, format string, args ...any) {
	w.t.Helper()
	w.t.Errorf("kind %d: %s", w.kind, fmt.Sprintf(format, args...))
	if id == "" || testing.Verbose() && *simCount == 1 {
		return
	}
	for _, line := range w.lines {
		if strings.Contains(line, id) || !strings.Contains(line, "event=") && !strings.Contains(line, "receipt") && !strings.Contains(line, "report") {
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
		for _, call := range p.calls {
			if call.status == http.StatusOK && (c == nil || call.client == c) {
				got++
			}
		}
		if p.status != http.StatusOK || got != n {
			w.failed(p.id, "%s: answered %d, forwarded %d times, want %d", p.path, p.status, got, n)
		}
	}
}

// TestSimulationOrders: a hold ends whatever comes first, a receipt, the report or
// the end of the stream.
func TestSimulationOrders(t *testing.T) {
	for _, order := range [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}} {
		inSim(t, func(t *testing.T, w *simWorld, r *simReplica) {
			p := w.send("accept", 1, 10)[0]
			var report bytes.Buffer
			(&Answer{Status: http.StatusAccepted}).appendReport(&report, p.id)
			signals := []Signal{
				{Kind: signalReceipt, Event: p.id, Given: []Given{{"s", "name"}}},
				{Kind: signalReport, Event: p.id, Channel: "accept", Client: "name", Data: report.Bytes()},
				{Kind: signalLeft, Channel: "accept", Subscriber: "s", Client: "name"},
			}
			for _, i := range order {
				r.hub.OnSignal(signals[i])
			}
			time.Sleep(time.Second)
			if n := r.server.Held().Webhooks; n != 0 {
				t.Errorf("order %v: %d stay held", order, n)
			}
			p.status = 0 // no target ever had it
		})
	}
}

// TestSimulationHandOver: what nobody took reaches, by way of another replica, the
// client that comes later.
func TestSimulationHandOver(t *testing.T) {
	inSim(t, func(t *testing.T, w *simWorld, r *simReplica) {
		posts := w.send("accept", 3, 10)
		w.startReplica()
		time.Sleep(time.Second)
		r.stop(0)
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

// TestSimulationFull: a client that is full gets everything once it has space.
func TestSimulationFull(t *testing.T) {
	inSim(t, func(t *testing.T, w *simWorld, r *simReplica) {
		r.stop(0)
		w.buffer, w.concurrency = 64<<10, 1
		r = w.startReplica()
		time.Sleep(time.Second)
		w.startClient("accept")
		time.Sleep(time.Second)
		w.targets["accept"].does.Store(simBusy)
		posts := w.send("accept", 20, 40_000)
		time.Sleep(5 * time.Second)
		if r.hub.Full.Load() == 0 {
			t.Error("the client was never full")
		}
		w.targets["accept"].does.Store(simAnswers)
		time.Sleep(20 * time.Second)
		w.want(posts, 1, nil)
	})
}

// TestSimulationAgain: however often the bus goes away, one client forwards
// everything once.
func TestSimulationAgain(t *testing.T) {
	inSim(t, func(t *testing.T, w *simWorld, r *simReplica) {
		w.kind = simNetwork
		other := w.startReplica()
		time.Sleep(time.Second)
		w.startClient("accept")
		w.startClient("status")
		time.Sleep(time.Second)
		var posts []*simPost
		for range 10 {
			posts = append(posts, w.send("accept", 5, 10)...)
			posts = append(posts, w.send("status", 2, 10)...)
			r.away(300 * time.Millisecond)
			other.away(w.upTo(600 * time.Millisecond))
		}
		time.Sleep(10 * time.Second)
		w.want(posts, 1, nil)
	})
}

// TestSimulationRolled: a client is replaced while its target is slow; everything
// arrives once, through one or the other.
func TestSimulationRolled(t *testing.T) {
	for _, gap := range []time.Duration{0, time.Second} {
		inSim(t, func(t *testing.T, w *simWorld, r *simReplica) {
			w.concurrency = 2
			first := w.startClient("accept")
			time.Sleep(time.Second)
			w.targets["accept"].does.Store(simSlow)
			posts := w.send("accept", 30, 10)
			if gap == 0 { // the next one is there before
				w.startClient("accept")
				time.Sleep(time.Second)
			}
			first.stop()
			if gap > 0 {
				time.Sleep(gap)
				w.startClient("accept")
			}
			time.Sleep(90 * time.Second)
			w.want(posts, 1, nil)
		})
	}
}
