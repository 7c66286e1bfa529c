package main

import (
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
	redis simRedis
	front *simHost  // where senders and legacy readers live
	log   logBuffer // all that was said
	wg    sync.WaitGroup

	buffer, concurrency int64
	maxAge              time.Duration
	latency             time.Duration // longest, of a connection
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
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		time.Sleep(c.hosts[0].w.upTo(c.hosts[0].w.latency))
		for _, h := range c.hosts {
			h.mu.Lock()
			wait := time.Until(h.stalled)
			h.mu.Unlock()
			sleep(c.over, wait)
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
	h.refuse(true)
	h.Close()
	for _, l := range h.open(true) {
		l.cut()
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

// The bus.

// simRedis passes on what replicas publish, as Redis does, but keeps the order
// only of what one replica sends to one name.
type simRedis struct {
	w     *simWorld
	mu    sync.Mutex
	delay time.Duration        // guarded by mu, like all below: longest of one way
	subs  map[simSub]bool      // who listens to what
	lanes map[string]time.Time // when the last message of each arrives
}

type simSub struct {
	*simSession
	name string
}

// later calls f after a while, and never before what came earlier on lane.
func (rd *simRedis) later(lane string, f func()) {
	rd.mu.Lock()
	defer rd.mu.Unlock()
	due := time.Now().Add(rd.w.upTo(rd.delay))
	if last := rd.lanes[lane]; !due.After(last) {
		due = last.Add(1)
	}
	rd.lanes[lane] = due
	time.AfterFunc(time.Until(due), f)
}

// listening lists who listens to names for which ok.
func (rd *simRedis) listening(ok func(simSub) bool) (list []simSub) {
	rd.mu.Lock()
	defer rd.mu.Unlock()
	for sub, listens := range rd.subs {
		if listens && ok(sub) {
			list = append(list, sub)
		}
	}
	return list
}

// publish hands data to all who listen to name.
func (rd *simRedis) publish(from *simBus, name string, data []byte) int {
	to := rd.listening(func(sub simSub) bool { return sub.name == name })
	for _, sub := range to {
		rd.later(from.replica+" "+name+" "+sub.bus.replica, func() { sub.receive(name, data) })
	}
	return len(to)
}

func (rd *simRedis) set(sub simSub, wanted bool) {
	rd.mu.Lock()
	defer rd.mu.Unlock()
	rd.subs[sub] = wanted && !isClosed(sub.over)
}

// simBus is the Bus of one replica: a RedisBus, but for its sessions.
type simBus struct {
	*RedisBus
	redis *simRedis
	link  *simSession // guarded by mu, like the next: the session, begun or not
	dead  bool        // no session any more
}

// simSession is one life of a bus's connections.
type simSession struct {
	bus  *simBus
	over chan struct{}
}

// watch is the hub's, which holds its lock.
func (b *simBus) watch(channel string) {
	time.AfterFunc(0, func() {
		if s, _ := b.now(); s != nil {
			s.steer(channel)
		}
	})
}

// now is the session, and a channel that is closed when it has begun.
func (b *simBus) now() (*simSession, chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.link, b.back
}

// steer makes the subscription to name what the hub wants it to be.
func (s *simSession) steer(name string) {
	b, sub := s.bus, simSub{s, name}
	b.redis.later(b.replica+" command", func() {
		b.redis.set(sub, name[0] == '@' || b.hub.Wants(name))
		b.redis.later(b.replica+" confirmation", func() { s.confirmed(sub) })
	})
}

func (s *simSession) confirmed(sub simSub) {
	b := s.bus
	b.mu.Lock()
	current := b.link == s && len(b.redis.listening(func(o simSub) bool { return o == sub })) > 0
	begins := current && sub.name == b.allName()
	if begins {
		close(b.back)
	} else if current && sub.name[0] != '@' {
		b.hub.Confirm(sub.name)
	}
	b.mu.Unlock()
	if begins {
		b.count()
		b.Tell(Signal{Kind: signalJoined, From: b.replica})
		b.Tell(Signal{Kind: signalAgain, From: b.replica})
	}
}

// connect begins a session.
func (b *simBus) connect() {
	b.mu.Lock()
	s := &simSession{bus: b, over: make(chan struct{})}
	begins := !b.dead && b.link == nil
	if begins {
		b.link = s
	}
	b.mu.Unlock()
	if begins {
		for _, name := range append(b.hub.Channels(), b.replicaName(b.replica), b.allName()) {
			s.steer(name)
		}
	}
}

// drop ends the session. Redis sees that at once, or within late.
func (b *simBus) drop(late time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hub.Suspend()
	s := b.link
	if s == nil {
		return
	}
	close(s.over)
	if b.link = nil; isClosed(b.back) {
		b.back = make(chan struct{})
	}
	unseen := max(0, b.redis.w.upTo(2*late)-late) // as often as not for no time
	time.AfterFunc(unseen, func() {
		for _, sub := range b.redis.listening(func(sub simSub) bool { return sub.simSession == s }) {
			b.redis.set(sub, false)
		}
	})
}

const simUnseen = 1500 * time.Millisecond

// away drops the session for a while.
func (b *simBus) away(d time.Duration) {
	b.drop(simUnseen)
	if d > time.Second {
		time.AfterFunc(time.Second, b.OnCutOff)
	}
	time.AfterFunc(d, b.connect)
}

// receive is session.receive.
func (s *simSession) receive(name string, data []byte) {
	b, w := s.bus, s.bus.redis.w
	if isClosed(s.over) {
		return
	}
	if name[0] == '@' {
		sig, err := openSignal(data)
		if err != nil || sig.From == b.replica {
			return
		}
		w.note("%s hears %s from=%s client=%s round=%d given=%v of %s%s", b.replica, sig.Kind, sig.From, sig.Client, sig.Round, sig.Given, sig.Event, sig.Subscriber)
		switch sig.Kind {
		case signalJoined:
			b.count()
			return
		case signalHand:
			w.mu.Lock()
			e := w.event(sig.Event)
			e.holder = append(e.holder, b.replica)
			w.mu.Unlock()
		}
		b.hub.OnSignal(sig)
		return
	}
	e, err := openEvent(name, bytes.Clone(data))
	if err != nil {
		w.t.Error(err)
		return
	}
	given := b.hub.Deliver(e)
	w.note("%s delivers event=%s holder=%s round=%d only=%s to %v", b.replica, e.ID, e.Holder, e.Round, e.Only, given)
	w.mu.Lock()
	publication := fmt.Sprint(e.Holder, e.Round)
	for _, g := range given {
		w.event(e.ID).given[publication] = append(w.event(e.ID).given[publication], g.Client)
	}
	w.mu.Unlock()
	sig := receipt(e, b.replica, given)
	e.release()
	b.Tell(sig)
}

// do publishes data, as RedisBus does: again when the session breaks.
func (b *simBus) do(ctx context.Context, name string, data []byte) (int, error) {
	data = bytes.Clone(data)
	for {
		s, back := b.now()
		if !isClosed(back) {
			select {
			case <-back:
				continue
			case <-ctx.Done():
				return 0, errBusDown
			}
		}
		reply := make(chan int, 1)
		b.redis.later(b.replica+" "+name, func() {
			if isClosed(s.over) && b.redis.w.upTo(1) == 0 { // it got through, or not
				return
			}
			n := b.redis.publish(b, name, data)
			b.redis.later(b.replica+" reply", func() { reply <- n })
		})
		select {
		case n := <-reply:
			return n, nil
		case <-s.over:
		}
		if ctx.Err() != nil {
			return 0, errBroken
		}
	}
}

func (b *simBus) Publish(ctx context.Context, e *Event) (int, error) {
	return b.do(ctx, e.Channel, e.message())
}

func (b *simBus) Send(ctx context.Context, sig Signal) (int, error) {
	if b.here(sig) {
		return 1, nil
	}
	if sig.Kind == signalHand {
		b.redis.w.mu.Lock()
		b.redis.w.event(sig.Event).handed = true
		b.redis.w.mu.Unlock()
	}
	return b.do(ctx, b.signalName(&sig), sig.encode())
}

func (b *simBus) Tell(sig Signal) {
	s, back := b.now()
	if b.here(sig) || !isClosed(back) {
		return
	}
	name, data := b.signalName(&sig), sig.encode()
	b.redis.later(b.replica+" "+name, func() {
		if !isClosed(s.over) {
			b.redis.publish(b, name, data)
		}
	})
}

func (b *simBus) Flush(ctx context.Context) { b.Send(ctx, Signal{Kind: signalJoined, From: b.replica}) }

// others are the replicas that listen.
func (b *simBus) others() map[string]bool {
	list := map[string]bool{}
	for _, sub := range b.redis.listening(func(sub simSub) bool { return len(sub.name) == 1+replicaLength && sub.name[0] == '@' && sub.bus != b }) {
		list[sub.bus.replica] = true
	}
	return list
}

func (b *simBus) Peers(ctx context.Context) ([]string, error) {
	return slices.Collect(maps.Keys(b.others())), b.Check(ctx)
}

func (b *simBus) Check(context.Context) error {
	if _, back := b.now(); !isClosed(back) {
		return errBusDown
	}
	return nil
}

// Run looks for replicas that are gone.
func (b *simBus) Run(ctx context.Context) error {
	for b.connect(); sleep(ctx, pingInterval); {
		if b.Check(ctx) == nil {
			b.count()
		}
	}
	b.drop(0)
	return nil
}

func (b *simBus) count() { b.notePeers(b.others()) }

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
	bus    *simBus
	web    *http.Server
	finish func()
	leaves time.Time // guarded by w.mu: when it began to shut down
}

func (w *simWorld) startReplica() *simReplica {
	r := &simReplica{hub: &Hub{Limits: Limits{Subscribers: 1000, PerAddress: 1000, Buffer: w.buffer}, Budget: &Budget{Limit: 64 << 20}}}
	log := r.start(w, newReplica())
	r.bus = &simBus{RedisBus: NewRedisBus(RedisOptions{}, r.who, r.hub, log), redis: &w.redis}
	r.hub.Watch = r.bus.watch
	r.server = must(NewServer(ServerOptions{
		Replica: r.who, MaxPayload: 3 << 20, Heartbeat: time.Second, HoldTime: simHoldTime, StreamMaxAge: w.maxAge,
		HandlerTimeout: simHandler, Modes: w.modes, Timeouts: byChannel[time.Duration]{Default: simResponse},
	}, r.hub, r.bus, log))
	r.hub.OnSignal, r.bus.OnCutOff = r.server.signal, r.server.AskToMove
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
	r.bus.mu.Lock()
	r.bus.dead = true
	r.bus.mu.Unlock()
	r.bus.drop(simUnseen)
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

// newWorld is a world with targets and nothing else.
func newSimWorld(t *testing.T, seed uint64) *simWorld {
	w := &simWorld{
		t: t, plan: rand.New(rand.NewPCG(seed, 1)), chances: rand.New(rand.NewPCG(seed, 2)), began: time.Now(),
		modes:  byChannel[string]{Default: modeAccept, Named: map[string]string{"status": modeStatus, "response": modeResponse}},
		buffer: 16 << 20, concurrency: 32, latency: 5 * time.Millisecond,
		hosts: map[string]*simHost{}, targets: map[string]*simTarget{}, events: map[string]*simEvent{},
	}
	w.redis = simRedis{w: w, delay: 5 * time.Millisecond, subs: map[simSub]bool{}, lanes: map[string]time.Time{}}
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
	w.redis.delay = within(0, []time.Duration{2 * time.Millisecond, 20 * time.Millisecond, 200 * time.Millisecond}[r.IntN(3)])
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
					r.bus.away(d/2 + w.upTo(time.Second))
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
	inSim(t, func(t *testing.T, w *simWorld, r *simReplica) {
		w.kind = simNetwork
		other := w.startReplica()
		time.Sleep(time.Second)
		w.startClient("accept")
		w.startClient("status")
		time.Sleep(time.Second)
		for range 8 {
			var posts []*simPost
			for range 10 {
				posts = slices.Concat(posts, w.send("accept", 5, 10), w.send("status", 2, 10))
				r.bus.away(300 * time.Millisecond)
				other.bus.away(w.upTo(600 * time.Millisecond))
			}
			time.Sleep(10 * time.Second)
			w.want(posts, 1, nil)
		}
	})
}
