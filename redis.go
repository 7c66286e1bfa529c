package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	publishTimeout = 800 * time.Millisecond  // to hear from Redis before a webhook gets 503
	pingInterval   = time.Second             // on every connection
	silenceTimeout = 2500 * time.Millisecond // on a connection before it counts as broken
	lasting        = time.Second             // for which a connection must last, or the next one waits
	settleTimeout  = 1500 * time.Millisecond // for the other replicas to come back after an outage
	unreadTimeout  = time.Second             // to read what Redis sent before a session ended
	largeEvent     = 256 << 10               // bytes beyond which messages are published one by one
	pipeCount      = 4                       // publishing connections
	pipeQueue      = 512                     // requests that wait on one of them
	signalQueue    = 16 << 10                // likewise on the first, which takes all signals: nobody repeats one
	pipeBatch      = 64                      // requests between two flushes; below pipeQueue, or the reader would wait for what was never sent
)

// RedisOptions configure a RedisBus.
type RedisOptions struct {
	URL         string
	Prefix      string // of all channel names
	Backoff     Backoff
	MaxAttempts int            // in a row; below 0: unlimited
	Roots       *x509.CertPool // for rediss; nil: the system's
}

// RedisBus makes replicas one relay. It uses pub/sub alone: one Redis channel
// per relay channel, subscribed while this replica has subscribers for it,
// and two for what replicas tell each other. "@" is in no channel's name, so
// nothing from outside reaches those two.
//
// Everything lives in sessions: a receiving connection and a few publishing
// ones that come up together. A session ends with its receiving connection, or
// when a publishing one cannot be replaced: what Redis sends between two
// sessions is lost. While there is no session nothing is queued.
type RedisBus struct {
	opts    RedisOptions
	replica string
	hub     *Hub
	log     *slog.Logger

	Sessions, Received atomic.Int64

	session atomic.Pointer[session] // nil while down
	known   atomic.Int64            // replicas seen last, this one included; 0: never looked
	noting  atomic.Bool             // a session is there that will look at dirty
	recount chan struct{}           // holds one token when known is out of date
	large   chan struct{}           // holds one token while a large event is being published

	mu    sync.Mutex
	dirty map[string]struct{} // guarded by mu: channels whose subscription may have to change; empty without a session
	poke  chan struct{}       // holds one token while dirty has entries
}

var errBusDown = errors.New("redis is not connected")

// NewRedisBus wires a bus that hands what it receives to hub.
func NewRedisBus(opts RedisOptions, replica string, hub *Hub, log *slog.Logger) *RedisBus {
	b := &RedisBus{opts: opts, replica: replica, hub: hub, log: log, dirty: map[string]struct{}{}, poke: make(chan struct{}, 1), recount: make(chan struct{}, 1), large: make(chan struct{}, 1)}
	hub.Watch = b.watch
	return b
}

// watch is the hub's: it runs under the hub's lock and only takes a note.
// Without a session it takes none: the next one asks for all that the hub wants.
func (b *RedisBus) watch(channel string) {
	if !b.noting.Load() {
		return
	}
	b.mu.Lock()
	b.dirty[channel] = struct{}{}
	b.mu.Unlock()
	wake(b.poke)
}

func (b *RedisBus) takeDirty() map[string]struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	dirty := b.dirty
	b.dirty = map[string]struct{}{}
	return dirty
}

// Names of Redis channels.

func (b *RedisBus) eventName(channel string) string   { return b.opts.Prefix + channel }
func (b *RedisBus) replicaName(replica string) string { return b.opts.Prefix + "@" + replica }
func (b *RedisBus) allName() string                   { return b.opts.Prefix + "@all" }

// working is the session, unless there is none or Redis is silent.
func (b *RedisBus) working() (*session, error) {
	s := b.session.Load()
	if s == nil || s.silent.Load() {
		return nil, errBusDown
	}
	return s, nil
}

// Check implements Bus.
func (b *RedisBus) Check(context.Context) error {
	_, err := b.working()
	return err
}

// Publish implements Bus. It fails at once while Redis is down or silent, and
// after publishTimeout when Redis does not answer or cannot keep up.
func (b *RedisBus) Publish(ctx context.Context, e *Event) (int, error) {
	s, err := b.working()
	if err != nil {
		return 0, err
	}
	return s.publish(ctx, s.next(), b.eventName(e.Channel), e.wire)
}

// publish hands message to Redis and returns how many take it. A burst of large
// ones is more than Redis keeps for a replica: those go one by one.
func (s *session) publish(ctx context.Context, p pipe, name string, message []byte) (int, error) {
	if len(message) > largeEvent {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, publishTimeout)
		defer cancel()
		select {
		case s.bus.large <- struct{}{}:
			defer func() { <-s.bus.large }()
		case <-ctx.Done():
			return 0, errors.New("too many large messages wait for redis")
		}
	}
	return redis.Int(s.do(ctx, p, "PUBLISH", name, message))
}

// Signal implements Bus. All signals take one connection, so that they keep
// their order, and wait there while Redis is silent; only one with From waits
// for Redis to answer.
func (b *RedisBus) Signal(ctx context.Context, sig Signal) (int, error) {
	if sig.To == b.replica {
		b.hub.OnSignal(sig)
		return 1, nil
	}
	s := b.session.Load()
	if s == nil {
		return 0, errBusDown
	}
	name := b.allName()
	if sig.To != "" {
		name = b.replicaName(sig.To)
	}
	if sig.From == "" {
		return 0, s.pipes[0].put(&request{cmd: "PUBLISH", args: []any{name, sig.encode()}})
	}
	return s.publish(ctx, s.pipes[0], name, sig.encode())
}

// Run implements Bus: one session after the other. The first try after a
// session comes at once, the next ones after growing pauses.
func (b *RedisBus) Run(ctx context.Context) error {
	backoff := b.opts.Backoff
	for tries, told := 0, false; ; {
		began := time.Now()
		worked, err := b.serve(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if worked || !told {
			b.log.Error("redis is down", "err", err)
			told = true
		} else {
			b.log.Debug("redis is still down", "err", err)
		}
		if worked {
			tries = 0
		} else {
			b.known.CompareAndSwap(0, math.MaxInt64) // others may come back after us: see join
			if tries++; b.opts.MaxAttempts >= 0 && tries > b.opts.MaxAttempts {
				return fmt.Errorf("connect to redis %d times: %w", tries, err)
			}
		}
		pause := time.Duration(0)
		if worked && time.Since(began) > lasting {
			backoff.Reset()
		} else {
			pause = backoff.Next()
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

// session is one life of the connections. Its goroutines end with ctx, and
// serve waits for them.
type session struct {
	bus      *RedisBus
	ctx      context.Context
	fail     context.CancelCauseFunc
	sub      redis.PubSubConn // written under mu, read by receive
	pipes    []pipe
	turn     atomic.Uint32
	wanted   chan struct{} // closed when every first subscription is confirmed
	complete sync.Once     // closes wanted
	heard    atomic.Int64  // Unix nanoseconds of the last word of Redis, on any connection
	silent   atomic.Bool   // a request was not answered, and none has been since

	mu    sync.Mutex           // taken before the hub's
	names map[string]*interest // guarded by mu: by Redis channel
	own   []string             // names that are not the hub's, the last to be subscribed
}

// interest is what Redis was told about one channel.
type interest struct {
	subscribed bool
	acks       int // confirmations on their way
}

// serve runs one session to its end and tells whether it came up.
func (b *RedisBus) serve(ctx context.Context) (worked bool, err error) {
	stopped := ctx
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	s := &session{
		bus: b, ctx: ctx, fail: fail, wanted: make(chan struct{}),
		names: map[string]*interest{}, own: []string{b.replicaName(b.replica), b.allName()},
	}
	conn, err := b.dial(ctx)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	s.sub = redis.PubSubConn{Conn: conn}
	var conns []redis.Conn // one for each of pipes
	for i := range pipeCount {
		queue := pipeQueue
		if i == 0 {
			queue = signalQueue
		}
		conn, err := b.dial(ctx)
		if err != nil {
			return false, err
		}
		defer conn.Close()
		conns = append(conns, conn)
		s.pipes = append(s.pipes, make(pipe, queue))
	}

	defer func() { // after receive has ended, which confirms
		b.hub.Suspend()
		b.noting.Store(false)
		b.takeDirty()
	}()
	var wg sync.WaitGroup
	defer wg.Wait()
	received := make(chan struct{}) // closed when receive has ended
	context.AfterFunc(ctx, func() { // ends a blocked read or write
		if stopped.Err() == nil { // what is unread was accepted from its senders
			select {
			case <-received:
			case <-time.After(unreadTimeout):
			}
		}
		s.sub.Close()
	})
	defer fail(nil)
	run := func(f func() error) {
		wg.Go(func() {
			defer func() { // redigo panics on lengths that cannot be
				if p := recover(); p != nil {
					fail(fmt.Errorf("redis speaks nonsense: %v", p))
				}
			}()
			if err := f(); err != nil {
				fail(err)
			}
		})
	}
	run(func() error {
		defer close(received)
		return s.receive()
	})
	for i, p := range s.pipes {
		run(func() error { return s.keep(p, conns[i]) })
	}
	if err := s.start(); err != nil {
		fail(err)
	}
	run(s.steer)
	select {
	case <-s.wanted:
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	if err := s.join(); err != nil {
		return false, err
	}
	b.session.Store(s)
	b.Sessions.Add(1)
	b.log.Info("redis is connected", "replicas", b.known.Load())
	again := Signal{Kind: signalAgain}
	if len(b.hub.Channels()) == 0 {
		again.To = b.replica // no subscriber here has missed anything that others hold
	}
	b.Signal(ctx, again)
	run(s.count)

	<-ctx.Done()
	b.session.Store(nil)
	return true, context.Cause(ctx)
}

// dial connects, within twice publishTimeout.
func (b *RedisBus) dial(ctx context.Context) (redis.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*publishTimeout)
	defer cancel()
	conn, err := redis.DialURLContext(ctx, b.opts.URL,
		redis.DialConnectTimeout(publishTimeout),
		redis.DialTLSHandshakeTimeout(publishTimeout),
		redis.DialReadTimeout(publishTimeout),
		redis.DialWriteTimeout(silenceTimeout),
		redis.DialTLSConfig(&tls.Config{RootCAs: b.opts.Roots, MinVersion: tls.VersionTLS12}),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to redis: %w", err)
	}
	return conn, nil
}

// start subscribes to all that the hub wants, and last to the replicas' own
// channels: a replica that is counted there has everything else.
func (s *session) start() error {
	s.bus.noting.Store(true)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.reconcile(s.bus.hub.Channels()); err != nil {
		return err
	}
	for _, name := range s.own {
		if err := s.want(name, true); err != nil {
			return err
		}
	}
	return s.sub.Conn.Flush()
}

// steer keeps the subscriptions what the hub wants them to be, and pings.
func (s *session) steer() error {
	ping := time.NewTicker(pingInterval)
	defer ping.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return nil
		case <-ping.C:
			s.mu.Lock()
			err := s.sub.Ping("")
			s.mu.Unlock()
			if err != nil {
				return err
			}
		case <-s.bus.poke:
			dirty := slices.Collect(maps.Keys(s.bus.takeDirty()))
			s.mu.Lock()
			err := s.reconcile(dirty)
			s.mu.Unlock()
			if err != nil {
				return err
			}
		}
	}
}

// reconcile tells Redis what the hub wants of channels now. The hub is asked
// under mu, which reconcile needs, so that the last command sent always
// matches the last answer.
func (s *session) reconcile(channels []string) error {
	for _, channel := range channels {
		if err := s.want(s.bus.eventName(channel), s.bus.hub.Wants(channel)); err != nil {
			return err
		}
	}
	return s.sub.Conn.Flush()
}

// want sends the command that changes name's subscription, if it must change.
// It needs mu.
func (s *session) want(name string, wanted bool) error {
	in := s.names[name]
	switch {
	case in == nil && !wanted:
		return nil
	case in == nil:
		in = &interest{}
		s.names[name] = in
	case in.subscribed == wanted:
		if wanted && in.acks == 0 { // a new first subscriber of a channel that was never left
			s.confirm(name)
		}
		return nil
	}
	in.subscribed = wanted
	in.acks++
	command := "UNSUBSCRIBE"
	if wanted {
		command = "SUBSCRIBE"
	}
	return s.sub.Conn.Send(command, name)
}

// confirmed notes one confirmation of Redis. They come in the order of the
// commands, so a channel is settled once none is on its way.
func (s *session) confirmed(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.names[name]
	if in == nil {
		return
	}
	in.acks--
	if in.acks == 0 {
		if in.subscribed {
			s.confirm(name)
		} else {
			delete(s.names, name)
		}
	}
	if name == s.bus.allName() { // asked for last: everything is subscribed
		s.complete.Do(func() { close(s.wanted) }) // Redis may say it twice
	}
}

// confirm makes the hub's channel live. It needs mu: nobody can unsubscribe
// the channel meanwhile.
func (s *session) confirm(name string) {
	if !slices.Contains(s.own, name) {
		s.bus.hub.Confirm(strings.TrimPrefix(name, s.bus.opts.Prefix))
	}
}

// receive hands on what Redis pushes, until the connection ends or is silent
// for longer than a ping takes.
func (s *session) receive() error {
	for {
		m := s.sub.ReceiveWithTimeout(silenceTimeout)
		if _, broken := m.(error); !broken {
			s.hear()
		}
		switch m := m.(type) {
		case redis.Message:
			s.deliver(m.Channel, m.Data)
		case redis.Subscription:
			s.confirmed(m.Channel)
		case error:
			return fmt.Errorf("receive from redis: %w", m)
		}
	}
}

// deliver hands one message to the hub, and for an event that asks for a
// response tells its holder to whom it went.
func (s *session) deliver(name string, data []byte) {
	b := s.bus
	if slices.Contains(s.own, name) {
		switch sig, err := openSignal(data); {
		case err != nil:
		case sig.Kind == signalJoined:
			wake(b.recount)
		default:
			b.hub.OnSignal(sig)
		}
		return
	}
	e, err := openEvent(strings.TrimPrefix(name, b.opts.Prefix), data)
	if err != nil {
		b.log.Warn("message from redis refused", "err", err)
		return
	}
	b.Received.Add(1)
	taken, _ := b.hub.Deliver(e)
	if respond(e.Mode) {
		b.Signal(s.ctx, takenSignal(e, taken))
	}
}

// join tells the other replicas of this one. After an outage it waits for those
// that were there before it: an event published earlier would miss the
// subscribers of a late one.
func (s *session) join() error {
	joined := Signal{Kind: signalJoined}
	if _, err := s.publish(s.ctx, s.pipes[0], s.bus.allName(), joined.encode()); err != nil {
		return fmt.Errorf("publish to redis: %w", err)
	}
	if err := s.primary(); err != nil {
		return err
	}
	late := time.NewTimer(settleTimeout)
	defer late.Stop()
	for waiting := true; ; {
		n, err := s.replicas()
		if err != nil {
			return err
		}
		if n >= s.bus.known.Load() || !waiting {
			s.bus.known.Store(max(n, 1))
			return nil
		}
		select {
		case <-s.bus.recount: // one more has joined
		case <-late.C:
			waiting = false
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		}
	}
}

// count keeps the number of replicas known, and looks after the publishing
// connections and after Redis itself.
func (s *session) count() error {
	tick := time.NewTicker(pingInterval)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return nil
		case <-s.bus.recount:
		case <-tick.C:
			for _, p := range s.pipes { // some servers close idle connections
				p.put(&request{cmd: "PING"})
			}
			if err := s.primary(); err == errDemoted {
				return err
			}
		}
		if n, err := s.replicas(); err == nil {
			s.bus.known.Store(max(n, 1))
		}
	}
}

var errDemoted = errors.New("redis is a replica of another one now, which replicas of the relay may have followed")

// primary is errDemoted when what is published here does not reach those who
// followed a failover (https://redis.io/docs/latest/commands/role/).
func (s *session) primary() error {
	v, err := redis.Values(s.do(s.ctx, s.pipes[0], "ROLE"))
	if _, refused := errors.AsType[redis.Error](err); refused {
		return nil // not every user may ask, and not every server knows
	}
	if err == nil && len(v) > 0 {
		if role, _ := redis.String(v[0], nil); role == "slave" {
			return errDemoted
		}
	}
	return err
}

// replicas asks Redis how many replicas listen.
func (s *session) replicas() (int64, error) {
	counts, err := redis.Values(s.do(s.ctx, s.pipes[0], "PUBSUB", "NUMSUB", s.bus.allName()))
	if err != nil || len(counts) != 2 {
		return 0, fmt.Errorf("count replicas: %w", err)
	}
	return redis.Int64(counts[1], nil)
}

// next is the publishing connection whose turn it is.
func (s *session) next() pipe {
	return s.pipes[s.turn.Add(1)%pipeCount]
}

// do puts a command on p and waits for its reply, at most publishTimeout.
func (s *session) do(ctx context.Context, p pipe, cmd string, args ...any) (any, error) {
	r := &request{cmd: cmd, args: args, reply: make(chan reply, 1)}
	if err := p.put(r); err != nil {
		return nil, err
	}
	began := time.Now()
	timer := time.NewTimer(publishTimeout)
	defer timer.Stop()
	select {
	case got := <-r.reply:
		return got.value, got.err
	case <-ctx.Done():
		r.drop()
		return nil, ctx.Err()
	case <-s.ctx.Done():
		return nil, errBusDown
	case <-timer.C:
		r.drop()
		if s.heard.Load() < began.UnixNano() && s.silent.CompareAndSwap(false, true) {
			s.bus.log.Error("redis is silent")
		}
		return nil, fmt.Errorf("redis did not answer within %s", publishTimeout)
	}
}

// hear notes that Redis has said something.
func (s *session) hear() {
	s.heard.Store(time.Now().UnixNano())
	if s.silent.CompareAndSwap(true, false) {
		s.bus.log.Info("redis answers again")
	}
}

// keep works on p over conn, and over a new connection when that breaks. It
// ends with s, or when none can be made or lasts.
func (s *session) keep(p pipe, conn redis.Conn) error {
	for {
		began := time.Now()
		err := s.work(p, conn)
		if s.ctx.Err() != nil || time.Since(began) < lasting {
			return err
		}
		s.bus.log.Warn("redis connection is replaced", "err", err)
		if conn, err = s.bus.dial(s.ctx); err != nil {
			return err
		}
		if p == s.pipes[0] { // signals may be lost
			s.bus.Signal(s.ctx, Signal{Kind: signalAgain})
		}
	}
}

// work sends the requests of p over conn and hands back the replies until conn
// breaks or s ends; whoever waits then is told.
func (s *session) work(p pipe, conn redis.Conn) error {
	ctx, fail := context.WithCancelCause(s.ctx)
	context.AfterFunc(ctx, func() { conn.Close() }) // ends blocked reads and writes
	flight := make(chan *request, pipeQueue)        // sent, not yet answered
	var wg sync.WaitGroup
	wg.Go(func() { fail(p.write(ctx, conn, flight)) })
	wg.Go(func() { fail(s.read(ctx, conn, flight)) })
	wg.Wait()
	conn.Close()
	err := fmt.Errorf("publish to redis: %w", context.Cause(ctx))
	for len(flight) > 0 {
		(<-flight).answer(nil, err)
	}
	return err
}

// request is one command on a publishing connection.
type request struct {
	cmd     string
	args    []any
	reply   chan reply  // with space for one; nil: nobody waits
	settled atomic.Bool // it is being sent, or nobody waits any more; who sets it owns args
}

type reply struct {
	value any
	err   error
}

// drop gives up a request, and its memory if it waits in the queue.
func (r *request) drop() {
	if !r.settled.Swap(true) {
		r.args = nil
	}
}

func (r *request) answer(value any, err error) {
	if r.reply != nil {
		r.reply <- reply{value, err}
	}
}

// pipe is the queue that one publishing connection after the other works off.
type pipe chan *request

// put queues r, or fails at once when the connection cannot keep up.
func (p pipe) put(r *request) error {
	select {
	case p <- r:
		return nil
	default:
		return errors.New("redis cannot keep up: publish queue is full")
	}
}

// write sends requests as they come, and flushes once for all that wait.
func (p pipe) write(ctx context.Context, conn redis.Conn, flight chan<- *request) error {
	for {
		var r *request
		select {
		case <-ctx.Done():
			return nil
		case r = <-p:
		}
		for n := 1; r != nil; n++ {
			if !r.settled.Swap(true) {
				select {
				case flight <- r:
				case <-ctx.Done():
					r.answer(nil, errBusDown)
					return nil
				}
				if err := conn.Send(r.cmd, r.args...); err != nil {
					return err
				}
			}
			r = nil
			if n < pipeBatch {
				select {
				case r = <-p:
				default:
				}
			}
		}
		if err := conn.Flush(); err != nil {
			return err
		}
	}
}

// read hands the replies back in the order of the requests.
func (s *session) read(ctx context.Context, conn redis.Conn, flight <-chan *request) error {
	for {
		var r *request
		select {
		case <-ctx.Done():
			return nil
		case r = <-flight:
		}
		value, err := redis.ReceiveWithTimeout(conn, silenceTimeout)
		if _, refused := errors.AsType[redis.Error](err); err != nil && !refused {
			r.answer(nil, err)
			return err
		}
		s.hear()
		r.answer(value, err)
	}
}
