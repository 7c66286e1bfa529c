// The bus over Redis: what it is told to do, the session that does it, the
// connection that listens (start, steer, receive), and the one that speaks (keep,
// write, read).

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	dialTimeout    = 800 * time.Millisecond  // for each step of a connection
	pingInterval   = time.Second             // on both connections
	silenceTimeout = 2500 * time.Millisecond // on a connection before it counts as broken
	lookTime       = 100 * time.Millisecond  // for one more look when that is over
	lasting        = time.Second             // for which a connection must last, or the next one waits
	joinTimeout    = 1500 * time.Millisecond // for the other replicas to come back after an outage
	unreadTimeout  = time.Second             // to read what Redis sent before a session ended
	largeMessage   = 256 << 10               // bytes beyond which messages are published one by one
	flightLimit    = 512                     // commands that Redis has not answered
	batchLimit     = 64                      // commands between two flushes; below flightLimit, or the reader would wait for what was never sent
	toldLimit      = 16 << 10                // signals that wait
)

// RedisOptions configure a RedisBus.
type RedisOptions struct {
	Server      RedisServer
	Prefix      string // of all channel names
	Backoff     Backoff
	MaxAttempts int            // in a row; below 0: unlimited
	Roots       *x509.CertPool // for rediss; nil: the system's
}

// RedisServer is what REDIS_URL says: an address, or sentinels that know it.
type RedisServer struct {
	Addr           string
	Sentinels      []string // asked in turn for the primary of Master at every dial
	Master         string
	User, Password string
	DB             int
	TLS            bool
}

// parseRedisURL reads redis://user:password@host:port/db, rediss:// and
// redis+sentinel://user:password@host:port,host:port/master/db.
func parseRedisURL(raw string) (r RedisServer, err error) {
	scheme, rest, _ := strings.Cut(raw, "://")
	at := strings.LastIndexByte(rest, '@')
	hosts, path, _ := strings.Cut(rest[at+1:], "/")
	list := strings.Split(hosts, ",")
	port := "6379"
	switch scheme {
	case "redis+sentinel":
		port = "26379"
		r.Master, path, _ = strings.Cut(path, "/")
		if r.Master == "" {
			return r, errors.New("must name the primary: redis+sentinel://host:port,host:port/{master}/{db}")
		}
	case "redis", "rediss":
		r.TLS = scheme == "rediss"
		if len(list) > 1 {
			return r, errors.New("must have one host; sentinels are redis+sentinel://")
		}
	default:
		return r, errors.New("must be a redis, rediss or redis+sentinel URL")
	}
	for i, host := range list {
		u, err := url.Parse(scheme + "://" + rest[:at+1] + host)
		if err != nil || u.Hostname() == "" {
			return r, errors.New("must be a redis, rediss or redis+sentinel URL")
		}
		list[i] = net.JoinHostPort(u.Hostname(), port)
		if u.Port() != "" {
			list[i] = u.Host
		}
		r.User = u.User.Username()
		r.Password, _ = u.User.Password()
	}
	if r.Addr = list[0]; r.Master != "" {
		r.Addr, r.Sentinels = "", list
	}
	if db, _, _ := strings.Cut(path, "?"); strings.Trim(db, "/") != "" {
		n, err := strconv.ParseUint(strings.Trim(db, "/"), 10, 31)
		if err != nil {
			return r, errors.New("must have a number as the last element of its path: the db")
		}
		r.DB = int(n)
	}
	return r, nil
}

// RedisBus makes replicas one relay. It uses pub/sub alone: one Redis channel
// per relay channel, subscribed while this replica has subscribers for it,
// and two for what replicas tell each other. "@" is in no channel's name, so
// nothing from outside reaches those two.
//
// Everything lives in sessions of two connections: one listens, one speaks. A
// session ends with the one that listens: what Redis sends between two sessions
// is lost. The one that speaks is dialled again by itself. While there is no
// session nothing is queued.
type RedisBus struct {
	opts     RedisOptions
	replica  string
	hub      *Hub
	log      *slog.Logger
	OnCutOff func()                                                            // set before use: Redis cannot be reached from here; another replica may be well
	Dial     func(ctx context.Context, network, addr string) (net.Conn, error) // set before use

	Sessions, Received atomic.Int64

	recount chan struct{} // holds one token when the peers are to be asked for
	large   chan struct{} // holds one token while a large message is being published
	poke    chan struct{} // holds one token while dirty has entries
	speak   chan struct{} // holds one token while told has entries
	ask     chan *request // unbuffered: what is given up before it is written is never queued

	mu sync.Mutex

	// Guarded by mu.
	session *session            // nil while Redis is away
	back    chan struct{}       // closed while there is a session
	cause   error               // why there is no session; nil: none was tried
	refused error               // what Redis said to the last message, when it took none
	noting  bool                // a session is there that will look at dirty
	dirty   map[string]struct{} // channels whose subscription may have to change; empty without a session
	told    []Signal            // not yet written; empty without a session
	peers   map[string]bool     // the other replicas, as last seen; nil: it has never looked
	late    bool                // others may come back after it: it could not connect at first
}

var (
	errBusDown = errors.New("redis is not connected")
	errBroken  = errors.New("connection to redis broke")
)

// NewRedisBus makes a bus that hands what it receives to hub, which its caller lets
// it watch.
func NewRedisBus(opts RedisOptions, replica string, hub *Hub, log *slog.Logger) *RedisBus {
	b := &RedisBus{
		opts: opts, replica: replica, hub: hub, log: log, OnCutOff: func() {}, Dial: (&net.Dialer{Timeout: dialTimeout}).DialContext,
		recount: make(chan struct{}, 1), large: make(chan struct{}, 1), poke: make(chan struct{}, 1), speak: make(chan struct{}, 1),
		ask: make(chan *request), back: make(chan struct{}), dirty: map[string]struct{}{},
	}
	return b
}

// watch is the hub's: it runs under the hub's lock and only takes a note.
// Without a session it takes none: the next one asks for all that the hub wants.
func (b *RedisBus) watch(channel string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.noting {
		b.dirty[channel] = struct{}{}
		wake(b.poke)
	}
}

// Names of Redis channels.

func (b *RedisBus) eventName(channel string) string   { return b.opts.Prefix + channel }
func (b *RedisBus) replicaName(replica string) string { return b.opts.Prefix + "@" + replica }
func (b *RedisBus) allName() string                   { return b.opts.Prefix + "@all" }

// signalName is the Redis channel for sig. Only names that a replica can have
// are ever sent to, so that nobody reaches "@all" by an id.
func (b *RedisBus) signalName(sig *Signal) string {
	if sig.To == "" {
		return b.allName()
	}
	return b.replicaName(sig.To)
}

// Check implements Bus.
func (b *RedisBus) Check(context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.session == nil && b.cause != nil:
		return fmt.Errorf("%w: %w", errBusDown, b.cause)
	case b.session == nil:
		return errBusDown
	case b.refused != nil:
		return b.refused
	case time.Since(time.Unix(0, b.session.heard.Load())) > silenceTimeout:
		return errors.New("redis is silent")
	}
	return nil
}

// Publish implements Bus.
func (b *RedisBus) Publish(ctx context.Context, e *Event) (int, error) {
	return b.publish(ctx, b.eventName(e.Channel), e.message())
}

// Send implements Bus.
func (b *RedisBus) Send(ctx context.Context, sig Signal) (int, error) {
	if b.here(sig) {
		return 1, nil
	}
	return b.publish(ctx, b.signalName(&sig), appendSignal(nil, &sig))
}

// Tell implements Bus. What cannot be queued is lost, and all replicas are told
// so once something can be.
func (b *RedisBus) Tell(sig Signal) {
	if b.here(sig) {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.session == nil: // the next one begins with signalAgain
	case len(b.told) < toldLimit:
		b.told = append(b.told, sig)
		wake(b.speak)
	default:
		b.told[toldLimit-1] = Signal{Kind: signalAgain, From: b.replica}
	}
}

// here hands sig on if it is for this replica, too, and reports whether it is for
// no other. Redis gives back what is for all, but perhaps not in time.
func (b *RedisBus) here(sig Signal) bool {
	if sig.To == "" || sig.To == b.replica {
		b.hub.OnSignal(sig)
	}
	return sig.To == b.replica
}

// Flush implements Bus: what was told goes out together with a command that is
// given after it.
func (b *RedisBus) Flush(ctx context.Context) {
	if b.Check(ctx) == nil {
		b.do(ctx, "PING")
	}
}

// Peers implements Bus.
func (b *RedisBus) Peers(ctx context.Context) ([]string, error) {
	if err := b.Check(ctx); err != nil {
		return nil, err
	}
	peers, err := b.peersBy(func(cmd string, args ...any) (any, error) { return b.do(ctx, cmd, args...) })
	return slices.Sorted(maps.Keys(peers)), err
}

// publish hands message to Redis and returns how many take it. It waits for a
// session, and tries again when the connection breaks, until ctx ends; but once
// written it waits until Redis answers or the connection breaks, because nobody
// could say which. A burst of large messages is more than Redis keeps for a
// replica: those go one by one.
func (b *RedisBus) publish(ctx context.Context, name string, message []byte) (int, error) {
	if len(message) > largeMessage {
		select {
		case b.large <- struct{}{}:
			defer func() { <-b.large }()
		case <-ctx.Done():
			return 0, errors.New("too many large messages wait for redis")
		}
	}
	for {
		n, err := redis.Int(b.do(ctx, "PUBLISH", name, message))
		if errors.Is(err, errBroken) && ctx.Err() == nil {
			continue
		}
		_, refused := errors.AsType[redis.Error](err)
		b.mu.Lock()
		if was := b.refused; refused || err == nil {
			b.refused = err
			if refused && was == nil {
				b.log.Error("redis refuses messages", "err", err)
			}
		}
		b.mu.Unlock()
		return n, err
	}
}

// do has one command written, and waits for its reply.
func (b *RedisBus) do(ctx context.Context, cmd string, args ...any) (any, error) {
	b.mu.Lock()
	back := b.back
	b.mu.Unlock()
	select {
	case <-back:
	case <-ctx.Done():
		return nil, errBusDown
	}
	return b.doNow(ctx, cmd, args...)
}

// request is one command on the connection that speaks.
type request struct {
	cmd   string
	args  []any
	reply chan reply // with space for one; nil: nobody waits
}

type reply struct {
	value any
	err   error
}

// doNow is do without waiting for a session to begin.
func (b *RedisBus) doNow(ctx context.Context, cmd string, args ...any) (any, error) {
	r := &request{cmd: cmd, args: args, reply: make(chan reply, 1)}
	select {
	case b.ask <- r:
		got := <-r.reply
		return got.value, got.err
	case <-ctx.Done():
		return nil, fmt.Errorf("redis cannot keep up: %w", ctx.Err())
	}
}

func (r *request) resolve(value any, err error) {
	if r.reply != nil {
		r.reply <- reply{value, err}
	}
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
		b.mu.Lock()
		b.cause = err
		b.mu.Unlock()
		if worked || !told {
			b.log.Error("redis is down", "err", err)
			told = true
		} else {
			b.log.Debug("redis is still down", "err", err)
		}
		if worked {
			tries = 0
		} else {
			if tries++; b.opts.MaxAttempts >= 0 && tries > b.opts.MaxAttempts {
				return fmt.Errorf("connect to redis %d times: %w", tries, err)
			}
			b.mu.Lock()
			b.late = true
			b.mu.Unlock()
			if tries == 1 {
				b.OnCutOff()
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

// session is one life of the two connections. Its goroutines end with ctx, and
// serve waits for them.
type session struct {
	bus      *RedisBus
	ctx      context.Context
	fail     context.CancelCauseFunc
	sub      redis.PubSubConn // listens; written under mu, read by receive
	wanted   chan struct{}    // closed when every first subscription is confirmed
	complete sync.Once        // closes wanted
	heard    atomic.Int64     // Unix nanoseconds of the last word of Redis, on any connection

	mu    sync.Mutex           // taken before the hub's
	names map[string]*interest // guarded by mu: by Redis channel
	own   []string             // names that are not the hub's, the last to be subscribed
}

// interest is what Redis was told about one channel.
type interest struct {
	subscribed bool
	acks       int // confirmations on their way
}

// serve runs one session to its end and reports whether it came up.
func (b *RedisBus) serve(ctx context.Context) (worked bool, err error) {
	stopped := ctx
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	s := &session{
		bus: b, ctx: ctx, fail: fail, wanted: make(chan struct{}),
		names: map[string]*interest{}, own: []string{b.replicaName(b.replica), b.allName()},
	}
	listens, err := b.dial(ctx)
	if err != nil {
		return false, err
	}
	defer listens.Close()
	s.sub = redis.PubSubConn{Conn: listens}
	speaks, err := b.dial(ctx)
	if err != nil {
		return false, err
	}
	defer b.end() // after receive has ended, which confirms
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
		listens.Close()
	})
	defer fail(nil)
	run := func(f func() error) { wg.Go(func() { s.guard(f) }) }
	run(func() error {
		defer close(received)
		return s.receive()
	})
	run(func() error { return s.keep(speaks) })
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
	b.begin(s)
	run(s.count)
	<-ctx.Done()
	return true, context.Cause(ctx)
}

// guard ends the session with the error of f.
func (s *session) guard(f func() error) {
	err := func() (err error) {
		defer nonsense(&err)
		return f()
	}()
	if err != nil {
		s.fail(err)
	}
}

// nonsense makes a panic an error, deferred: redigo panics on lengths that
// cannot be, and whoever plays Redis must not end the relay.
func nonsense(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("redis speaks nonsense: %v", p)
	}
}

// begin makes s the session, and says that what was told before may be lost.
func (b *RedisBus) begin(s *session) {
	b.mu.Lock()
	b.session = s
	close(b.back)
	peers := len(b.peers)
	b.mu.Unlock()
	b.Sessions.Add(1)
	b.log.Info("redis is connected", "replicas", peers+1)
	b.Tell(Signal{Kind: signalAgain, From: b.replica})
}

// end is the end of the session, and of one that has not begun.
func (b *RedisBus) end() {
	b.hub.Suspend()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.session != nil {
		b.session = nil
		b.back = make(chan struct{})
	}
	b.noting, b.dirty, b.told = false, map[string]struct{}{}, nil
}

// link is one connection.
type link struct {
	redis.ConnWithTimeout
	raw *patient
}

// broken closes a connection that does not work any more. What is not sent yet is
// never sent: nobody waits for it.
func (l *link) broken() {
	if tcp, ok := l.raw.Conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	l.Close()
}

// patient is a connection whose reads look once more when their deadline has
// passed: while the process stood still, that proves nothing.
type patient struct{ net.Conn }

func (p *patient) Read(b []byte) (int, error) {
	n, err := p.Conn.Read(b)
	if n == 0 && errors.Is(err, os.ErrDeadlineExceeded) {
		p.SetReadDeadline(time.Now().Add(lookTime))
		n, err = p.Conn.Read(b)
	}
	return n, err
}

// dial connects to the server, or to the primary that the sentinels name now.
func (b *RedisBus) dial(ctx context.Context) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*dialTimeout)
	defer cancel()
	o := &b.opts.Server
	addr := o.Addr
	if o.Sentinels != nil {
		var err error
		if addr, err = b.primaryOf(ctx); err != nil {
			return nil, err
		}
	}
	return b.dialTo(ctx, addr, redis.DialUsername(o.User), redis.DialPassword(o.Password), redis.DialDatabase(o.DB), redis.DialUseTLS(o.TLS))
}

// dialTo connects to addr.
func (b *RedisBus) dialTo(ctx context.Context, addr string, options ...redis.DialOption) (l *link, err error) {
	defer nonsense(&err)
	l = &link{}
	host, _, _ := net.SplitHostPort(addr)
	conn, err := redis.DialContext(ctx, "tcp", addr, append(options,
		redis.DialContextFunc(func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := b.Dial(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			l.raw = &patient{conn}
			return l.raw, nil
		}),
		redis.DialTLSHandshakeTimeout(dialTimeout),
		redis.DialReadTimeout(dialTimeout),
		redis.DialWriteTimeout(silenceTimeout),
		redis.DialTLSConfig(&tls.Config{RootCAs: b.opts.Roots, MinVersion: tls.VersionTLS12, ServerName: host}),
	)...)
	if err != nil {
		return nil, fmt.Errorf("connect to redis: %w", err)
	}
	l.ConnWithTimeout = conn.(redis.ConnWithTimeout)
	return l, nil
}

// primaryOf asks the sentinels in turn where the primary is
// (https://redis.io/docs/latest/develop/reference/sentinel-clients/).
func (b *RedisBus) primaryOf(ctx context.Context) (addr string, err error) {
	for _, sentinel := range b.opts.Server.Sentinels {
		var l *link
		if l, err = b.dialTo(ctx, sentinel); err != nil {
			continue
		}
		var at []string
		at, err = redis.Strings(l.Do("SENTINEL", "get-master-addr-by-name", b.opts.Server.Master))
		l.Close()
		if err == nil && len(at) == 2 {
			return net.JoinHostPort(at[0], at[1]), nil
		}
	}
	return "", fmt.Errorf("ask sentinels for the primary of %q: %w", b.opts.Server.Master, err)
}

// start subscribes to all that the hub wants, and last to the replicas' own
// channels: a replica that is counted there has everything else.
func (s *session) start() error {
	s.bus.mu.Lock()
	s.bus.noting = true
	s.bus.mu.Unlock()
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
	b := s.bus
	ping := time.NewTicker(pingInterval)
	defer ping.Stop()
	for {
		var err error
		select {
		case <-s.ctx.Done():
			return nil
		case <-ping.C:
			s.mu.Lock()
			err = s.sub.Ping("")
			s.mu.Unlock()
		case <-b.poke:
			b.mu.Lock()
			dirty := b.dirty
			b.dirty = map[string]struct{}{}
			b.mu.Unlock()
			s.mu.Lock()
			err = s.reconcile(slices.Collect(maps.Keys(dirty)))
			s.mu.Unlock()
		}
		if err != nil {
			return err
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
		s.complete.Do(func() { close(s.wanted) }) // whoever plays Redis may say it twice
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
			s.heard.Store(time.Now().UnixNano())
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

// deliver hands one message to the hub, and for an event tells its holder to
// whom it was given.
func (s *session) deliver(name string, data []byte) {
	b := s.bus
	if slices.Contains(s.own, name) {
		for len(data) > 0 {
			var wire string
			var err error
			if data, err = cutFields(data, &wire); err != nil {
				return
			}
			s.hear([]byte(wire))
		}
		return
	}
	e, err := openEvent(strings.TrimPrefix(name, b.opts.Prefix), data)
	if err != nil {
		b.log.Warn("message from redis refused", "err", err)
		return
	}
	b.Received.Add(1)
	sig := receipt(e, b.replica, b.hub.Deliver(e))
	e.release()
	b.Tell(sig)
}

// hear takes one signal of another replica.
func (s *session) hear(wire []byte) {
	sig, err := openSignal(wire)
	switch {
	case err != nil || sig.Kind == signalGone: // that is ours to say
	case sig.Kind == signalJoined:
		wake(s.bus.recount)
	case sig.From == s.bus.replica && sig.To == "": // Tell has handed it on already
	default:
		s.bus.hub.OnSignal(sig)
	}
}

// appendSignal appends sig to a message: signals of one destination travel
// together, each behind its length.
func appendSignal(b []byte, sig *Signal) []byte {
	wire := sig.encode()
	return append(binary.AppendUvarint(b, uint64(len(wire))), wire...)
}

// join tells the other replicas of this one. After an outage it waits for those
// that were there before it: an event published earlier would miss the
// subscribers of a late one.
func (s *session) join() error {
	b := s.bus
	ctx, cancel := context.WithTimeout(s.ctx, joinTimeout)
	defer cancel()
	joined := Signal{Kind: signalJoined, From: b.replica}
	if _, err := s.do("PUBLISH", b.allName(), appendSignal(nil, &joined)); err != nil {
		return fmt.Errorf("publish to redis: %w", err)
	}
	if err := s.primary(); err != nil {
		return err
	}
	b.mu.Lock()
	before, blind := b.peers, b.peers == nil && b.late
	b.mu.Unlock()
	for {
		now, err := b.peersBy(s.do)
		if err != nil {
			return err
		}
		missing := blind
		for name := range before {
			missing = missing || !now[name]
		}
		if missing && ctx.Err() == nil {
			select {
			case <-b.recount: // one more has joined
			case <-ctx.Done():
			}
			continue
		}
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		b.notePeers(now)
		return nil
	}
}

// count keeps the other replicas known, and looks after the connection that
// speaks and after Redis itself.
func (s *session) count() error {
	tick := time.NewTicker(pingInterval)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return nil
		case <-s.bus.recount:
		case <-tick.C:
			if err := s.primary(); err == errDemoted {
				return err
			}
			s.bus.mu.Lock()
			refused := s.bus.refused
			s.bus.mu.Unlock()
			if refused != nil { // perhaps it takes messages again
				s.bus.Send(s.ctx, Signal{Kind: signalJoined, From: s.bus.replica})
			}
		}
		if now, err := s.bus.peersBy(s.do); err == nil {
			s.bus.notePeers(now)
		}
	}
}

// notePeers tells of the replicas that are no more.
func (b *RedisBus) notePeers(now map[string]bool) {
	b.mu.Lock()
	before := b.peers
	b.peers = now
	b.mu.Unlock()
	for name := range before {
		if !now[name] {
			b.hub.OnSignal(Signal{Kind: signalGone, From: name})
		}
	}
}

var errDemoted = errors.New("redis is a replica of another one now, which replicas of the relay may have followed")

// primary is errDemoted when what is published here does not reach those who
// followed a failover (https://redis.io/docs/latest/commands/role/).
func (s *session) primary() error {
	v, err := redis.Values(s.do("ROLE"))
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

// do is RedisBus.do for a session that has not begun.
func (s *session) do(cmd string, args ...any) (any, error) {
	return s.bus.doNow(s.ctx, cmd, args...)
}

// peersBy asks Redis which other replicas listen
// (https://redis.io/docs/latest/commands/psubscribe/ has the pattern).
func (b *RedisBus) peersBy(do func(cmd string, args ...any) (any, error)) (map[string]bool, error) {
	own := b.replicaName("")
	escaped := strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`, "]", `\]`).Replace(own)
	list, err := redis.Strings(do("PUBSUB", "CHANNELS", escaped+"*"))
	if err != nil {
		return nil, fmt.Errorf("ask redis for replicas: %w", err)
	}
	peers := map[string]bool{}
	for _, name := range list {
		if replica := strings.TrimPrefix(name, own); replica != b.replica && len(replica) == replicaLength {
			peers[replica] = true
		}
	}
	return peers, nil
}

// keep works over conn, and over a new connection when that breaks. It ends with
// s, or when none can be made or lasts.
func (s *session) keep(conn *link) error {
	for {
		began := time.Now()
		err := s.work(conn)
		if s.ctx.Err() != nil || time.Since(began) < lasting {
			return err
		}
		s.bus.log.Warn("redis connection is replaced", "err", err)
		if conn, err = s.bus.dial(s.ctx); err != nil {
			return err
		}
		s.bus.Tell(Signal{Kind: signalAgain, From: s.bus.replica}) // what was told may be lost
	}
}

// work sends what is asked and told over conn and hands back the replies until
// conn breaks or s ends; whoever waits then is told.
func (s *session) work(conn *link) error {
	ctx, fail := context.WithCancelCause(s.ctx)
	defer fail(nil)
	context.AfterFunc(ctx, func() { // ends blocked reads and writes
		if s.ctx.Err() == nil {
			conn.broken()
		}
		conn.Close()
	})
	flight := make(chan *request, flightLimit) // sent, not yet answered
	var wg sync.WaitGroup
	for _, f := range []func() error{
		func() error { return s.write(ctx, conn, flight) },
		func() error { return s.read(ctx, conn, flight) },
	} {
		wg.Go(func() { fail(f()) })
	}
	wg.Wait()
	for len(flight) > 0 {
		(<-flight).resolve(nil, errBroken)
	}
	return fmt.Errorf("publish to redis: %w", context.Cause(ctx))
}

// write sends requests as they come, then what was told, and flushes once for
// all that wait.
func (s *session) write(ctx context.Context, conn redis.Conn, flight chan<- *request) error {
	var batch []*request
	for {
		batch = batch[:0]
		select {
		case <-ctx.Done():
			return nil
		case r := <-s.bus.ask:
			batch = append(batch, r)
		case <-s.bus.speak:
		}
		for more := true; more && len(batch) < batchLimit; {
			select {
			case r := <-s.bus.ask:
				batch = append(batch, r)
			default:
				more = false
			}
		}
		batch = s.bus.takeTold(batch)
		for i, r := range batch {
			select {
			case flight <- r:
			case <-ctx.Done():
				for _, r := range batch[i:] {
					r.resolve(nil, errBroken)
				}
				return nil
			}
			if err := conn.Send(r.cmd, r.args...); err != nil {
				for _, r := range batch[i+1:] {
					r.resolve(nil, errBroken)
				}
				return err
			}
		}
		if err := conn.Flush(); err != nil {
			return err
		}
	}
}

// takeTold appends to batch what was told, in one message for each destination
// unless that would be large.
func (b *RedisBus) takeTold(batch []*request) []*request {
	b.mu.Lock()
	told := b.told
	b.told = nil
	b.mu.Unlock()
	messages := map[string]*request{}
	for i := range told {
		name := b.signalName(&told[i])
		r := messages[name]
		if r == nil || len(r.args[1].([]byte)) > largeMessage {
			r = &request{cmd: "PUBLISH", args: []any{name, []byte(nil)}}
			messages[name] = r
			batch = append(batch, r)
		}
		r.args[1] = appendSignal(r.args[1].([]byte), &told[i])
	}
	return batch
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
		value, err := receiveReply(conn)
		if _, refused := errors.AsType[redis.Error](err); err != nil && !refused {
			r.resolve(nil, errBroken)
			return err
		}
		s.heard.Store(time.Now().UnixNano())
		r.resolve(value, err)
	}
}

// receiveReply waits for one reply.
func receiveReply(conn redis.Conn) (value any, err error) {
	defer nonsense(&err)
	return redis.ReceiveWithTimeout(conn, silenceTimeout)
}
