// The client: its stream, what it forwards, and how it reports. In the order of a
// webhook: follow keeps a stream, read takes events from it, take gives each a
// slot, forward tries the target, and the reporter tells the source. At the end
// what these use: clocks, the memory of events, and the parser of streams.

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The client's fixed bounds; the package doc lists what happens at each.
const (
	connectTimeout   = 10 * time.Second       // for a connection, and again for a TLS handshake
	readyTimeout     = 20 * time.Second       // from the request to ready
	reconnectMax     = 5 * time.Second        // longest pause between two tries to subscribe
	refusedMax       = 30 * time.Second       // the same when the source says that the client is at fault
	streamLasts      = time.Second            // for which a stream must have been ready, or the next one waits
	lookAgain        = 250 * time.Millisecond // for one more look when a stream has been silent for too long
	silenceDefault   = 30 * time.Second       // when the source announces no usable heartbeat interval
	leaveTime        = time.Minute            // for the source to end a stream that it asked to leave
	keepBuffer       = 1 << 20                // bytes of parse buffer kept after a large event
	retryInitial     = 250 * time.Millisecond // first pause before forwarding again
	retryMax         = 10 * time.Second       // longest pause, unless the target asks for more
	retryHeld        = time.Second            // longest pause while a sender waits, likewise
	redirectLimit    = 5                      // 307 and 308 in a row
	answerHeaders    = 64 << 10               // bytes of a target's header
	discardTimeout   = 500 * time.Millisecond // for a body that nobody wants, so that its connection can be used again
	reportTimeout    = 5 * time.Second        // for one try to report
	reportsAtOnce    = 4                      // requests with reports under way
	takenDelay       = 100 * time.Millisecond // for which a report that nobody waits for may wait for company
	takenTime        = time.Minute            // after which it is given up
	takenLimit       = 16384                  // such reports that wait
	asideLimit       = 64 << 20               // bytes of webhooks that wait outside of a slot
	asideCost        = 4 << 10                // bytes that one of them takes besides its own
	partingTime      = time.Second            // at the end, to tell what is being forwarded
	reportBatch      = 1 << 20                // bytes of reports in one of them, beyond the first
	clocksLimit      = 64                     // replicas whose clocks are known
	ageWindow        = 5 * time.Minute        // after which a clock is compared anew
	memoryEvents     = 16384                  // event ids remembered
	memoryBytes      = 16 << 20               // bytes of answers remembered
	memoryAge        = 15 * time.Minute       // for which they are remembered
	reuseTimeout     = 4 * time.Second        // idle target connections: Node closes them after 5 s (nodejs.org, server.keepAliveTimeout)
	heartbeatMinimum = 100 * time.Millisecond // announced intervals outside of
	heartbeatMaximum = 5 * time.Minute        // these are not believed
)

// ClientOptions configure a Client.
type ClientOptions struct {
	Source            *url.URL // .../subscribe/{channel}/
	Token             string
	Certificate       func() (*tls.Certificate, error) // for the source, asked for at each connection; nil: none
	UserAgent         string                           // towards the source
	ReconnectInterval time.Duration
	HandlerTimeout    time.Duration // to finish forwards at the end

	Target      *url.URL       // its query, if any, goes before the webhook's
	StripPrefix bool           // the target sees the path behind /webhooks/{channel}
	Timeout     time.Duration  // of one attempt
	RetryWindow time.Duration  // from the first attempt; 0: no retries
	RetryOn     []int          // statuses that are worth another try
	Concurrency int            // forwards at once; 1 keeps the order
	Insecure    bool           // do not verify the target's certificate
	Roots       *x509.CertPool // nil: the system's
}

// Client holds one stream to the source, of one channel, and forwards what
// arrives on it.
type Client struct {
	opts    ClientOptions
	log     *slog.Logger
	name    string // for X-Relay-Client: ties reports to streams
	base    string // path of the target, without trailing slash
	channel string // whose webhooks it takes, and no others

	sourceURL, targetURL string // as they may be shown

	source *http.Transport
	target *http.Transport

	slots    chan struct{}   // one per forward under way
	forwards sync.WaitGroup  // owned by Run
	work     context.Context // of forwards; set by Run, ends after the handler timeout
	taking   context.Context // set by Run; ends when no more events are taken
	memory   memory
	reporter reporter
	aside    atomic.Int64                 // bytes of webhooks that wait outside of a slot
	waiting  atomic.Int64                 // how many these are
	current  atomic.Pointer[subscription] // the stream that counts; nil: none is ready
	state    atomic.Pointer[StreamState]  // what of it only follow knows; immutable
	probes   chan struct{}                // taken by the follow loop: proof that it lives

	Events, Duplicates, Invalid, Overdue, Retries, Reconnects, Reports atomic.Int64

	Forwards tally     // webhooks that are done, by what the target said last
	Denied   tally     // tries to subscribe that did not succeed, by reason
	Attempts Histogram // one attempt at the target
	Age      Histogram // of an event when it arrives, beside the youngest seen

	// Note keeps p for the status page in place of entry, or as a new one when that
	// is 0, and returns its number. Set before use.
	Note func(entry uint64, p Passage) uint64
}

// NewClient wires a client. Both transports speak HTTP/1.1 alone: a dead
// HTTP/2 connection would be shared by the stream and the tries to replace
// it, and HTTP/2 splits cookie fields.
func NewClient(opts ClientOptions, log *slog.Logger) *Client {
	var http1 http.Protocols
	http1.SetHTTP1(true)
	transport := func(insecure bool) *http.Transport {
		return &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            (&net.Dialer{Timeout: connectTimeout, KeepAlive: 15 * time.Second}).DialContext,
			TLSHandshakeTimeout:    connectTimeout,
			TLSClientConfig:        &tls.Config{RootCAs: opts.Roots, InsecureSkipVerify: insecure, MinVersion: tls.VersionTLS12},
			Protocols:              &http1,
			DisableCompression:     true, // bodies pass as they are, and Accept-Encoding is the provider's
			MaxResponseHeaderBytes: answerHeaders,
			MaxIdleConnsPerHost:    opts.Concurrency,
		}
	}
	channel := sourceChannel(opts.Source)
	c := &Client{
		opts: opts, log: log.With("channel", channel),
		name:    rand.Text(),
		base:    strings.TrimRight(opts.Target.EscapedPath(), "/"),
		channel: channel, sourceURL: location(opts.Source), targetURL: location(opts.Target),
		source: transport(false),
		target: transport(opts.Insecure),
		slots:  make(chan struct{}, opts.Concurrency),
		probes: make(chan struct{}),

		Forwards: newTally(forwardCodes...), Denied: newTally(deniedReasons...),
		Note: func(uint64, Passage) uint64 { return 0 },
	}
	c.turn("connecting", nil)
	c.reporter.client = c
	if opts.Certificate != nil {
		c.source.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return opts.Certificate() }
	}
	c.source.IdleConnTimeout = time.Minute
	c.target.IdleConnTimeout = reuseTimeout
	return c
}

// Run subscribes and forwards until ctx ends; then it takes no more events,
// finishes those it has within the handler timeout, and returns.
func (c *Client) Run(ctx context.Context) {
	work, abandon := context.WithCancel(context.WithoutCancel(ctx))
	defer abandon()
	c.work, c.taking = work, ctx
	context.AfterFunc(ctx, func() {
		time.AfterFunc(c.opts.HandlerTimeout, abandon) // for what is taken already
	})
	c.follow(ctx)
	c.reporter.flush()
	c.forwards.Wait()
	c.source.CloseIdleConnections()
	c.target.CloseIdleConnections()
}

// Check is nil while the stream is ready and its last byte fresh.
func (c *Client) Check(context.Context) error {
	s := c.current.Load()
	if s == nil {
		return errors.New("no stream")
	}
	if quiet := time.Since(time.Unix(0, s.heard.Load())); quiet > s.patience() {
		return fmt.Errorf("nothing read from the stream for %s", quiet.Round(time.Second))
	}
	return nil
}

// Alive is nil while the follow loop turns.
func (c *Client) Alive(ctx context.Context) error {
	select {
	case c.probes <- struct{}{}:
		return nil
	case <-ctx.Done():
		return errors.New("follow loop is stuck")
	}
}

// Streams. One subscription is current; while it is asked to move, or is
// gone, next is on its way to replace it: make before break. The one before is
// read to its end, which the source makes.

// subscription is one stream. Its goroutine closes the channels.
type subscription struct {
	cancel context.CancelFunc
	ready  chan struct{} // closed at ready
	drain  chan struct{} // closed at drain
	done   chan struct{} // closed at the end, after err is set
	err    error
	before <-chan struct{} // done of the stream it is to replace; nil: there was none

	heard    atomic.Int64 // Unix nanoseconds of the last read that began or ended
	doubted  atomic.Bool  // the watchdog has fired, and looks once more
	interval atomic.Int64 // nanoseconds between heartbeats, as announced; 0 before ready
}

// patience is how long a stream may be silent once it is ready: two heartbeats,
// and a second for the network.
func (s *subscription) patience() time.Duration {
	return 2*time.Duration(s.interval.Load()) + time.Second
}

// none is no subscription: its channels block for ever.
var none = &subscription{}

// follow keeps one stream alive until ctx ends, and never gives up before.
func (c *Client) follow(ctx context.Context) {
	streaming, cancel := context.WithCancel(context.WithoutCancel(ctx)) // until it has parted
	var streams sync.WaitGroup
	defer streams.Wait()
	defer cancel()
	defer c.current.Store(nil)

	backoff := Backoff{Initial: c.opts.ReconnectInterval, Max: max(reconnectMax, c.opts.ReconnectInterval), Factor: 2, Jitter: true}
	unwelcome := Backoff{Initial: c.opts.ReconnectInterval, Max: max(refusedMax, c.opts.ReconnectInterval), Factor: 2, Jitter: true}
	retry := time.NewTimer(0)
	defer retry.Stop()
	waiting := true // retry is set
	retryIn := func(d time.Duration) {
		waiting = true
		retry.Reset(d)
	}
	current, next := none, none
	var drained <-chan struct{} // current.drain, until it was asked to move
	var since time.Time         // when current became ready
	for {
		select {
		case <-ctx.Done():
			c.part()
			return
		case <-c.probes:
		case <-retry.C:
			waiting = false
			if current == none {
				c.turn("connecting", nil)
			}
			next = c.subscribe(streaming, &streams, current.done)
		case <-next.ready:
			backoff.Reset()
			unwelcome.Reset()
			if current != none {
				old := current
				leave := time.AfterFunc(leaveTime, old.cancel)
				streams.Go(func() { // ends with the stream
					<-old.done
					leave.Stop()
				})
			}
			current, next, drained, since = next, none, next.drain, time.Now()
			c.current.Store(current)
			c.turn("ready", nil)
			c.log.Info("stream ready", "source", c.sourceURL, "target", c.targetURL, "webhooks", c.webhooks())
		case <-next.done:
			pause := backoff.Next()
			if e, ok := errors.AsType[*statusError](next.err); ok && e.status < 500 {
				pause = unwelcome.Next()
			}
			c.denied(next.err, pause)
			if current == none {
				c.turn("waiting", next.err)
			}
			next = none
			retryIn(pause)
		case <-drained:
			c.log.Info("stream asked to move")
			drained = nil
			c.source.CloseIdleConnections() // they may lead to the replica that leaves
			if next == none && !waiting {   // at once, unless the source asks for nothing else
				retryIn(max(0, max(c.opts.ReconnectInterval, streamLasts)-time.Since(since)))
			}
		case <-current.done:
			c.log.Warn("stream ended", "age", time.Since(since), "err", current.err)
			c.turn("waiting", current.err)
			c.Reconnects.Add(1)
			current, drained = none, nil
			c.current.Store(nil)
			if next != none {
				break
			}
			if time.Since(since) >= streamLasts {
				retryIn(0)
			} else if !waiting {
				retryIn(backoff.Next())
			}
		}
	}
}

// denied tells why there is no stream yet; a wrong token needs a human.
func (c *Client) denied(err error, pause time.Duration) {
	reason, hint := trouble(err)
	c.Denied[reason].Add(1)
	level := slog.LevelWarn
	if reason == "token" || reason == "address" {
		level = slog.LevelError
	}
	attrs := []any{"source", c.sourceURL, "again", pause, "err", err}
	if hint != "" {
		attrs = append(attrs, "hint", hint)
	}
	c.log.Log(context.Background(), level, "no stream from the source", attrs...)
}

// deniedReasons are all that may stand in the label.
var deniedReasons = []string{"address", "busy", "connection", "path", "silent", "status", "tls", "token"}

// trouble is why a connection to the source, or to the target, gave nothing of
// use, and what may mend it, in the reader's words.
func trouble(err error) (reason, hint string) {
	if refused, ok := errors.AsType[*statusError](err); ok {
		switch refused.status {
		case http.StatusUnauthorized:
			return "token", "AUTH_TOKEN is missing, or is not one that the source takes for this channel"
		case http.StatusForbidden:
			return "address", "the source does not take streams from this address (SUBSCRIBE_ALLOWED_IPS)"
		case http.StatusNotFound:
			return "path", "is this a relay's /subscribe/{channel}? (SOURCE_URL)"
		case http.StatusServiceUnavailable:
			return "busy", "the source is full, is shutting down or has lost its Redis"
		case http.StatusBadRequest:
			return "status", "does the source want https? (SOURCE_URL)"
		}
		return "status", ""
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "tls", "nobody known vouches for the certificate: name its CA in CA_FILE"
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return "tls", "the certificate is for another host name than the URL has"
	}
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		if invalid.Reason == x509.Expired {
			return "tls", "the certificate has expired or is not valid yet: renew it, or set this machine's clock"
		}
		return "tls", "the certificate is not valid for a server"
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return "tls", "no TLS is spoken there: is it http:// instead of https://?"
	}
	if alert, ok := errors.AsType[*net.OpError](err); ok && alert.Op == "remote error" { // as crypto/tls has it
		return "tls", "the other side refused the handshake: " + alert.Err.Error()
	}
	if name, ok := errors.AsType[*net.DNSError](err); ok && name.IsNotFound {
		return "connection", "no such host: check the URL"
	}
	switch {
	case errors.Is(err, errNotReady):
		return "silent", "a proxy may be buffering the stream: turn that off for /subscribe/"
	case errors.Is(err, errMalformed):
		return "connection", "what is spoken there is no HTTP: is it https:// instead of http://?"
	case errors.Is(err, errNoEvents):
		return "path", "is this a relay's /subscribe/{channel}? (SOURCE_URL)"
	}
	return "connection", ""
}

// turn notes for the status page what has become of the stream.
func (c *Client) turn(state string, err error) {
	next := StreamState{State: state, Since: time.Now()}
	if last := c.state.Load(); last != nil {
		next.Error, next.ErrorAt = last.Error, last.ErrorAt
	}
	if err != nil {
		next.Error, next.ErrorAt = err.Error(), &next.Since
	}
	c.state.Store(&next)
}

// StreamState is what the status page shows of a client.
type StreamState struct {
	Channel  string     `json:"channel"`
	State    string     `json:"state"` // ready, connecting or waiting
	Since    time.Time  `json:"since"`
	Source   string     `json:"source"`
	Target   string     `json:"target"`
	Webhooks string     `json:"webhooks"` // the URL for the provider
	Forwards int        `json:"forwards"` // under way
	Waiting  int64      `json:"waiting"`  // for another try, or for their report to arrive
	Retries  int64      `json:"retries"`
	Error    string     `json:"error,omitempty"` // the last one
	ErrorAt  *time.Time `json:"errorAt,omitempty"`
}

// State is the client now.
func (c *Client) State() StreamState {
	s := *c.state.Load()
	s.Channel, s.Source, s.Target, s.Webhooks = c.channel, c.sourceURL, c.targetURL, c.webhooks()
	s.Forwards, s.Waiting, s.Retries = len(c.slots), c.waiting.Load(), c.Retries.Load()
	return s
}

// location is u without what must not be shown: credentials and query.
func location(u *url.URL) string {
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
}

// webhooks is the URL to give to a provider, as far as the source's tells.
func (c *Client) webhooks() string {
	base := strings.TrimSuffix(strings.TrimRight(c.sourceURL, "/"), "/subscribe/"+c.channel)
	return base + "/webhooks/" + c.channel
}

// statusError is an answer of the source that is no stream.
type statusError struct{ status int }

func (e *statusError) Error() string {
	return fmt.Sprintf("source answered %d %s", e.status, http.StatusText(e.status))
}

var (
	errSilent   = errors.New("stream went silent")
	errNotReady = fmt.Errorf("no ready within %s", readyTimeout)
	errNoEvents = errors.New("source answered 200 but no text/event-stream")
	errEnded    = errors.New("source ended the stream")
)

// subscribe starts a stream in a goroutine of streams, which ends with ctx or
// with the stream.
func (c *Client) subscribe(ctx context.Context, streams *sync.WaitGroup, before <-chan struct{}) *subscription {
	ctx, cancel := context.WithCancelCause(ctx)
	s := &subscription{
		before: before,
		cancel: func() { cancel(context.Canceled) },
		ready:  make(chan struct{}), drain: make(chan struct{}), done: make(chan struct{}),
	}
	streams.Go(func() {
		defer close(s.done)
		defer s.cancel()
		var watchdog *time.Timer
		watchdog = alarm(func() {
			if s.doubted.Swap(true) {
				cancel(errSilent)
			} else { // while the process stood still, the time proves nothing
				watchdog.Reset(lookAgain)
			}
		})
		watchdog.Reset(readyTimeout)
		defer watchdog.Stop()
		s.err = c.read(ctx, s, watchdog)
		if cause := context.Cause(ctx); cause == errSilent {
			if s.err = cause; s.interval.Load() == 0 {
				s.err = errNotReady
			}
		}
		c.source.CloseIdleConnections() // what broke a stream may have broken them
	})
	return s
}

// read opens the stream and takes its events to the end.
func (c *Client) read(ctx context.Context, s *subscription, watchdog *time.Timer) error {
	req := c.sourceRequest(ctx, http.MethodGet, c.opts.Source, nil)
	req.Header.Set("Accept", "text/event-stream")
	req.Header.Set("Cache-Control", "no-cache")
	req.Header.Set("X-Relay-Features", "http, respond, drain")
	resp, err := c.source.RoundTrip(req)
	if err != nil {
		return bare(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return &statusError{resp.StatusCode} // redirects too: the token goes to no other host
	}
	if kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); kind != "text/event-stream" {
		return errNoEvents
	}
	p, clocks := newParser(&watchedReader{resp.Body, s, watchdog}), &clocks{began: time.Now()}
	for {
		m, err := p.next()
		if err == io.EOF {
			return errEnded
		}
		if err != nil {
			return bare(err)
		}
		switch m.name {
		case "ready":
			if s.interval.Load() == 0 {
				watchdog.Stop() // from now on it runs while a read waits
				s.doubted.Store(false)
				s.interval.Store(int64(announced(m.data)))
				close(s.ready)
			}
		case "drain":
			select {
			case <-s.drain:
			default:
				close(s.drain)
			}
		case "webhook", "message":
			if c.opts.Concurrency == 1 && s.before != nil { // what the stream before has is older
				select {
				case <-s.before:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			if err := c.take(&m, clocks); err != nil {
				<-ctx.Done() // what was taken is told before the stream ends
				return err
			}
		}
	}
}

// announced is the heartbeat interval in the data of a ready event.
func announced(data []byte) time.Duration {
	var ready struct{ HeartbeatInterval float64 }
	if json.Unmarshal(data, &ready) == nil {
		d := ready.HeartbeatInterval * float64(time.Millisecond)
		if d >= float64(heartbeatMinimum) && d <= float64(heartbeatMaximum) {
			return time.Duration(d)
		}
	}
	return (silenceDefault - time.Second) / 2
}

// watchedReader runs the watchdog while a read waits, and only then: a client
// that stops reading because it is full must not cut its own stream.
type watchedReader struct {
	r        io.Reader
	s        *subscription
	watchdog *time.Timer
}

func (w *watchedReader) Read(p []byte) (int, error) {
	ready := w.s.interval.Load() > 0 // before, its timeout runs through
	if ready {
		w.watchdog.Reset(w.s.patience())
	}
	w.s.heard.Store(time.Now().UnixNano())
	n, err := w.r.Read(p)
	if ready {
		w.watchdog.Stop()
		w.s.doubted.Store(false)
	}
	w.s.heard.Store(time.Now().UnixNano())
	return n, err
}

// sourceChannel is the last element of the source's path.
func sourceChannel(source *url.URL) string {
	path := strings.TrimRight(source.EscapedPath(), "/")
	return path[strings.LastIndexByte(path, '/')+1:]
}

// sourceRequest is a request to the source with everything that opens it.
func (c *Client) sourceRequest(ctx context.Context, method string, u *url.URL, body io.Reader) *http.Request {
	req, _ := http.NewRequestWithContext(ctx, method, u.String(), body) // u and method were checked at start
	req.Header.Set("User-Agent", c.opts.UserAgent)
	req.Header.Set("X-Relay-Client", c.name)
	if c.opts.Token != "" {
		req.Header.Set("X-Auth-Token", c.opts.Token)
	}
	setUserinfo(req)
	return req
}

// setUserinfo turns credentials of the URL into a header, as http.Client does.
func setUserinfo(req *http.Request) {
	if u := req.URL.User; u != nil && req.Header["Authorization"] == nil {
		password, _ := u.Password()
		req.SetBasicAuth(u.Username(), password)
	}
}

var errMalformed = errors.New("malformed HTTP answer")

// bare takes out of an error what must not be logged: net/http quotes the
// bytes of a malformed answer, which may echo a payload.
func bare(err error) error {
	_, header := errors.AsType[textproto.ProtocolError](err)
	_, verify := errors.AsType[*tls.CertificateVerificationError](err)
	_, network := errors.AsType[*net.OpError](err)
	if header || !verify && !network && strings.Contains(err.Error(), `"`) {
		return errMalformed
	}
	return err
}

// Forwarding.

// take accepts one event: it waits for a free slot, which keeps the order and
// bounds memory, and forwards in a goroutine that Run waits for. It does not
// give up when its stream ends: another stream may have dropped the event as a
// duplicate meanwhile. Its only error is the end of the client: what is not
// taken by then was not reported, and its server gives it to the next client.
func (c *Client) take(m *message, clocks *clocks) error {
	c.Events.Add(1)
	received := time.Now()
	w, err := c.open(m)
	if err != nil {
		c.Invalid.Add(1)
		c.log.Warn("event refused", "err", err)
		return nil
	}
	var age time.Duration
	if w.ID != "" {
		age = clocks.age(w)
		c.Age.Observe(age)
	}
	waited := respond(w.Mode)
	if waited { // its time began when the server took it
		if received = received.Add(-age); age > w.Timeout {
			c.Overdue.Add(1)
			c.log.Warn("event is over, its sender has been answered", "event", w.ID)
			return nil
		}
	}
	known := w.ID != ""
	if !known {
		w.ID = rand.Text() // a legacy server's ids count per stream
	} else if first, taken, answer := c.memory.begin(w.ID, w.Mode); !first {
		c.Duplicates.Add(1)
		c.log.Debug("event is a duplicate", "event", w.ID)
		switch { // what was reported is reported again: it may have been lost
		case w.Mode == modeAccept && taken:
			c.reporter.taken(w.ID)
		case waited && answer != nil:
			c.forwards.Go(func() { c.reporter.report(w.ID, answer, received.Add(w.Timeout)) })
		}
		return nil
	}
	over := c.taking.Done()
	if w.Mode == "" { // nobody else gets it
		over = c.work.Done()
	}
	select {
	case <-over:
		c.memory.forget(w.ID)
		return c.taking.Err()
	default:
	}
	select {
	case c.slots <- struct{}{}:
	case <-over:
		c.memory.forget(w.ID)
		return c.taking.Err()
	}
	taken := c.memory.take(w.ID, func() {
		if w.Mode == modeAccept {
			c.reporter.taken(w.ID)
		}
	})
	if !taken {
		<-c.slots
		return c.taking.Err()
	}
	c.forwards.Go(func() {
		slot := &slot{c, true}
		defer slot.leave()
		a := c.forward(c.work, w, received, slot)
		if known {
			c.memory.finish(w.ID, &a)
		}
		if waited {
			slot.stepAside(len(a.Body))
			c.reporter.report(w.ID, &a, received.Add(w.Timeout))
			slot.back(len(a.Body))
		}
	})
	return nil
}

// open reads an event in either form.
func (c *Client) open(m *message) (*Webhook, error) {
	if m.name == "webhook" {
		return decodeWebhook(c.channel, m.id, m.data)
	}
	return decodeLegacy(c.channel, m.data)
}

// slot is the place of one forward among those that run. What only waits gives
// it up meanwhile, unless order is kept, or so much waits already that the client
// must stop reading. It belongs to the forward's goroutine.
type slot struct {
	client *Client
	taken  bool
}

// stepAside gives the slot up while something with size bytes waits; back ends
// that, without the slot.
func (s *slot) stepAside(size int) {
	c := s.client
	c.waiting.Add(1)
	if c.aside.Add(asideCost+int64(size)) <= asideLimit && c.opts.Concurrency > 1 {
		s.leave()
	}
}

func (s *slot) back(size int) {
	s.client.waiting.Add(-1)
	s.client.aside.Add(-asideCost - int64(size))
}

// retake takes a slot again, as soon as there is one; false when ctx ends first.
func (s *slot) retake(ctx context.Context) bool {
	if s.taken {
		return true
	}
	select {
	case s.client.slots <- struct{}{}:
		s.taken = true
	case <-ctx.Done():
	}
	return s.taken
}

func (s *slot) leave() {
	if s.taken {
		s.taken = false
		<-s.client.slots
	}
}

// forward brings w to the target, and tells once how that went.
func (c *Client) forward(ctx context.Context, w *Webhook, received time.Time, slot *slot) Answer {
	p := Passage{
		Event: w.ID, Channel: c.channel, Method: shown(w.Method), Path: shown(w.Path), Time: time.Now(), Bytes: len(w.Body), Outcome: outcomeForwarding,
	}
	entry := c.Note(0, p)
	a, attempt, err := c.try(ctx, w, received, slot)
	code := a.Err
	if a.Status != 0 {
		code = fmt.Sprintf("%dxx", a.Status/100)
	}
	c.Forwards[code].Add(1)
	p = p.became(outcomeForwarded, "")
	level, message, more := slog.LevelInfo, "webhook forwarded", []slog.Attr{slog.String("target", c.targetURL)}
	switch {
	case err != nil:
		p.Outcome, p.Reason = outcomeFailed, code
		level, message, more = slog.LevelError, "webhook given up", append(more, slog.Any("err", err))
		if _, hint := trouble(err); hint != "" {
			more = append(more, slog.String("hint", hint))
		}
	case a.Status >= 400:
		level = slog.LevelWarn
	}
	p.Status, p.Attempt = a.Status, attempt
	c.Note(entry, p)
	p.tell(c.log, level, message, more...)
	return a
}

// forwardCodes are all that may stand in the label: what the target said last, or
// why it said nothing.
var forwardCodes = []string{"2xx", "3xx", "4xx", "5xx", answerUnreachable, answerTimeout}

// errOver is why w is given up although the target answers.
var errOver = errors.New("no time is left for another try")

// try sends w to the target until it answers with something final, or the time is
// over, which is an error: the retry window, or what the event has left for its
// sender. It returns the best that the target said, and how many attempts it took.
func (c *Client) try(ctx context.Context, w *Webhook, received time.Time, slot *slot) (last Answer, attempt int, err error) {
	end := time.Now().Add(c.opts.RetryWindow)
	backoff := Backoff{Initial: retryInitial, Max: retryMax, Factor: 2, Jitter: true}
	if respond(w.Mode) {
		// The report must arrive before the sender's time is over.
		end = received.Add(w.Timeout - min(w.Timeout/10, 500*time.Millisecond))
		backoff.Max = retryHeld
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, end)
		defer cancel()
	}
	for attempt = 1; ; attempt++ {
		began := time.Now()
		a, pause, failure := c.attempt(ctx, w)
		c.Attempts.Observe(time.Since(began))
		if failure == nil && a.Err == "" && !c.passing(a.Status) || errors.Is(failure, errHeard) {
			return a, attempt, failure
		}
		if a.Status != 0 || last.Status == 0 && (last.Err == "" || a.Err == answerUnreachable) {
			last, err = a, cmp.Or(failure, errOver) // what the target said beats its silence, and that it cannot be reached a time that ran out
		}
		wait := max(backoff.Next(), pause)
		if time.Until(end) <= wait || ctx.Err() != nil {
			return last, attempt, err
		}
		c.Retries.Add(1)
		c.log.Warn("webhook will be forwarded again", "event", w.ID, "method", shown(w.Method), "path", shown(w.Path), "target", c.targetURL,
			"status", a.Status, "attempt", attempt, "wait", wait, "err", failure)
		slot.stepAside(len(w.Body))
		sleep(ctx, wait)
		slot.back(len(w.Body))
		if !slot.retake(ctx) {
			return last, attempt, err
		}
	}
}

// passing reports whether a status is worth another try.
func (c *Client) passing(status int) bool { return slices.Contains(c.opts.RetryOn, status) }

// requestTarget is where w goes at the target: the base, one slash, and the path
// as received, or what of it is behind the prefix.
func (c *Client) requestTarget(w *Webhook) string {
	path, query := w.Path, w.Query
	if c.opts.StripPrefix {
		path = strings.TrimPrefix(path, "/webhooks/"+c.channel)
	}
	target := c.base + path
	if path == "" {
		target = cmp.Or(c.opts.Target.EscapedPath(), "/")
	}
	if first := c.opts.Target.RawQuery; first != "" {
		query = strings.Replace(query, "?", "&", 1)
		target += "?" + first
	}
	return target + query
}

// attempt sends w once, over 307 and 308 within the base if need be. The
// error explains an Answer with Err; pause is the target's Retry-After.
func (c *Client) attempt(ctx context.Context, w *Webhook) (a Answer, pause time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.opts.Timeout)
	defer cancel()
	target := c.requestTarget(w)
	for range redirectLimit + 1 {
		resp, err := c.target.RoundTrip(c.targetRequest(ctx, w, target))
		if err != nil {
			return c.unanswered(ctx, err)
		}
		next, redirected := c.redirect(resp, target)
		if redirected {
			drop(resp.Body)
			target = next
			continue
		}
		return c.readAnswer(ctx, w, resp)
	}
	return Answer{Err: answerUnreachable}, 0, fmt.Errorf("%w: more than %d redirects", errHeard, redirectLimit)
}

// errHeard marks a target that has the webhook, but whose answer is of no use:
// another try would only deliver it once more.
var errHeard = errors.New("useless answer")

// unanswered is the answer for a target that gave none.
func (c *Client) unanswered(ctx context.Context, err error) (Answer, time.Duration, error) {
	if ctx.Err() != nil {
		return Answer{Err: answerTimeout}, 0, bare(err)
	}
	return Answer{Err: answerUnreachable}, 0, bare(err)
}

// readAnswer reads what the target said: for a sender that waits the body too,
// and otherwise only enough of it to use the connection again.
func (c *Client) readAnswer(ctx context.Context, w *Webhook, resp *http.Response) (Answer, time.Duration, error) {
	defer resp.Body.Close()
	a := Answer{Status: resp.StatusCode}
	pause := retryAfterOf(resp.Header.Get("Retry-After"))
	if a.Status < 200 || a.Status > 599 { // 101 is none that could be passed on
		return Answer{Err: answerUnreachable}, pause, fmt.Errorf("%w: status %d", errHeard, resp.StatusCode)
	}
	if w.Mode != modeResponse {
		drop(resp.Body)
		return a, pause, nil
	}
	a.Headers = slices.DeleteFunc(endToEnd(resp.Header), func(h Header) bool { return checkHeaders([]Header{h}) != nil })
	if headerBytes(a.Headers) > answerHeaders-1<<10 || valueCount(resp.Header) > fieldLimit { // no report has more
		c.log.Warn("header of the target's answer is too large, it is left out", "event", w.ID, "status", a.Status)
		a.Headers = nil
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, answerLimit+1))
	switch {
	case err != nil && !c.passing(a.Status):
		a, pause, err := c.unanswered(ctx, err)
		return a, pause, fmt.Errorf("%w: %w", errHeard, err)
	case err != nil || len(body) > answerLimit: // half a body would be worse than none
		c.log.Warn("answer of the target is too large or cut off, its body is left out", "event", w.ID, "status", a.Status)
	default:
		a.Body = body
	}
	return a, pause, nil
}

// drop reads and closes a body that nobody wants, so that its connection can
// be used again; one that stalls is not waited for.
func drop(body io.ReadCloser) {
	late := time.AfterFunc(discardTimeout, func() { body.Close() })
	defer late.Stop()
	io.Copy(io.Discard, io.LimitReader(body, 64<<10))
	body.Close()
}

// retryAfterOf reads a Retry-After of RFC 9110 section 10.2.3: seconds or a date.
func retryAfterOf(v string) time.Duration {
	if seconds, err := strconv.ParseUint(v, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(v); err == nil {
		return max(0, time.Until(at))
	}
	return 0
}

// targetRequest is a fresh request for w. URL.Opaque carries the request
// target byte for byte where URL.Path would be cleaned; behind a proxy it must
// hold the authority too (RFC 9112 section 3.2.2).
func (c *Client) targetRequest(ctx context.Context, w *Webhook, target string) *http.Request {
	t := c.opts.Target
	u := &url.URL{Scheme: t.Scheme, Host: t.Host, User: t.User, Opaque: target}
	if strings.HasPrefix(target, "//") { // no relay sends this, and Opaque would take it for an authority
		path, query, _ := strings.Cut(target, "?")
		u.Opaque, u.RawPath = "", path
		u.Path, _ = url.PathUnescape(path)
		u.RawQuery, u.ForceQuery = query, query == "" && len(path) < len(target)
	}
	req := (&http.Request{
		Method:        w.Method,
		URL:           u,
		Header:        make(http.Header, len(w.Headers)+4),
		Body:          http.NoBody,
		ContentLength: int64(len(w.Body)),
	}).WithContext(ctx)
	if len(w.Body) > 0 {
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(w.Body)), nil }
		req.Body, _ = req.GetBody()
	}
	if t.Scheme == "http" && u.Opaque != "" && c.target.Proxy != nil {
		if proxy, _ := c.target.Proxy(req); proxy != nil && strings.HasPrefix(proxy.Scheme, "http") {
			u.Opaque = "//" + t.Host + target
		}
	}
	for _, h := range w.Headers {
		req.Header[h.Name] = h.Values
	}
	if agent := req.Header["User-Agent"]; len(agent) != 1 || agent[0] == "" {
		// net/http sends one that is not empty, its own if need be, unless the name is spelled otherwise.
		req.Header["User-Agent"], req.Header["user-agent"] = nil, agent
	}
	if host := req.Header["Host"]; host != nil {
		delete(req.Header, "Host")
		if req.Header["X-Forwarded-Host"] == nil {
			req.Header["X-Forwarded-Host"] = host
		}
	}
	if w.Scheme != "" && req.Header["X-Forwarded-Proto"] == nil {
		req.Header["X-Forwarded-Proto"] = []string{w.Scheme}
	}
	req.Header["X-Relay-Event-Id"] = []string{w.ID}
	setUserinfo(req)
	return req
}

// redirect is the next request target when resp is a 307 or 308 that stays on
// the target's scheme, host and port and within its base path. Any other
// redirect is an answer like every other.
func (c *Client) redirect(resp *http.Response, from string) (target string, ok bool) {
	if resp.StatusCode != http.StatusTemporaryRedirect && resp.StatusCode != http.StatusPermanentRedirect {
		return "", false
	}
	location := resp.Header.Get("Location")
	to, err := url.Parse(location)
	if err != nil || location == "" || to.Opaque != "" {
		return "", false
	}
	base, err := url.ParseRequestURI(from)
	if err != nil {
		return "", false
	}
	base.Scheme, base.Host = c.opts.Target.Scheme, c.opts.Target.Host
	to = base.ResolveReference(to)
	if !strings.EqualFold(to.Scheme, c.opts.Target.Scheme) || !strings.EqualFold(hostPort(to), hostPort(c.opts.Target)) {
		return "", false
	}
	if !within(c.base, to.EscapedPath()) || checkQuery(to.RawQuery) != nil {
		return "", false
	}
	return to.RequestURI(), true
}

// within reports whether path is base or below it, and stays there.
func within(base, path string) bool {
	rest, ok := strings.CutPrefix(path, base)
	return ok && checkPath(cmp.Or(rest, "/")) == nil
}

func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// sleep waits for d; it is false when ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// reporter brings reports to the source, as HTTP responses one after the other:
// a few requests at a time, and whatever waits meanwhile goes into the next, so
// that load makes requests fewer, not more.
type reporter struct {
	client *Client
	mu     sync.Mutex

	// Guarded by mu.
	queue []*report     // somebody waits for them
	lazy  []*report     // nobody does
	delay *time.Timer   // set while lazy may wait for company
	busy  int           // goroutines in send
	idle  chan struct{} // closed when there are none; nil: nobody waits for that
}

// report is one answer on its way to the source.
type report struct {
	id   string
	data []byte
	end  time.Time     // when nobody waits for it any more
	done chan struct{} // closed when it has arrived, or is given up; nil: nobody asks
}

func newReport(id string, a *Answer, end time.Time) *report {
	var data bytes.Buffer
	a.appendReport(&data, id)
	return &report{id: id, data: data.Bytes(), end: end}
}

// report reports a, and returns once that has arrived or end is over.
func (r *reporter) report(id string, a *Answer, end time.Time) {
	one := newReport(id, a, end)
	one.done = make(chan struct{})
	r.mu.Lock()
	r.queue = append(r.queue, one)
	r.start()
	r.mu.Unlock()
	<-one.done
}

// taken reports that the client has an event of accept mode. Nobody waits for
// that, so it may wait for others.
func (r *reporter) taken(id string) {
	one := newReport(id, &Answer{Status: http.StatusAccepted}, time.Now().Add(takenTime))
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lazy = append(r.lazy, one); len(r.lazy) > takenLimit {
		r.lazy = r.lazy[1:] // the server gives the event again
	}
	if r.delay == nil {
		r.delay = time.AfterFunc(takenDelay, r.flush)
	}
}

// flush sends what nobody waits for, too.
func (r *reporter) flush() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.delay != nil {
		r.delay.Stop()
		r.delay = nil
	}
	if r.queue, r.lazy = append(r.queue, r.lazy...), nil; len(r.queue) > 0 {
		r.start()
	}
}

// finish returns once all reports have arrived, or when ctx ends.
func (r *reporter) finish(ctx context.Context) {
	r.flush()
	r.mu.Lock()
	idle := make(chan struct{})
	if r.idle = idle; r.busy == 0 {
		close(idle)
		r.idle = nil
	}
	r.mu.Unlock()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}

// start sees that somebody sends. It needs mu.
func (r *reporter) start() {
	if r.busy < reportsAtOnce {
		r.busy++
		r.client.forwards.Go(r.send)
	}
}

// send sends what waits until nothing does.
func (r *reporter) send() {
	backoff := Backoff{Initial: retryInitial, Max: retryHeld, Factor: 2, Jitter: true}
	for batch := r.take(); len(batch) > 0; batch = r.take() {
		err := r.client.sendReports(r.client.work, batch)
		if err == nil {
			backoff.Reset()
			r.client.Reports.Add(int64(len(batch)))
		}
		pause := time.Duration(0)
		if err != nil {
			pause = backoff.Next()
		}
		refusal, ok := errors.AsType[*statusError](err)
		final := ok && refusal.status == http.StatusBadRequest || r.client.work.Err() != nil
		r.mu.Lock()
		for _, one := range batch {
			if err != nil && !final && time.Until(one.end) > pause {
				r.queue = append(r.queue, one)
				continue
			}
			if err != nil {
				r.client.log.Warn("report given up", "event", one.id, "err", err)
			}
			if one.done != nil {
				close(one.done)
			}
		}
		r.mu.Unlock()
		if err != nil {
			sleep(r.client.work, pause)
		}
	}
}

// take removes from the queue what fits into one request; those for which nobody
// waits come along. With nothing there its caller sends no more.
func (r *reporter) take() (batch []*report) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.queue) > 0 {
		r.queue, r.lazy = append(r.queue, r.lazy...), nil
	}
	size, n := 0, 0
	for n < len(r.queue) && (n == 0 || size+len(r.queue[n].data) <= reportBatch) {
		size += len(r.queue[n].data)
		n++
	}
	batch = slices.Clone(r.queue[:n])
	if r.queue = slices.Delete(r.queue, 0, n); n == 0 {
		if r.busy--; r.busy == 0 && r.idle != nil {
			close(r.idle)
			r.idle = nil
		}
	}
	return batch
}

// part takes nothing more, and tells, before the streams end for good, what has
// been taken: it will be forwarded, and nobody else must get it.
func (c *Client) part() {
	ctx, cancel := context.WithTimeout(c.work, partingTime)
	defer cancel()
	var batch []*report
	for _, id := range c.memory.close() {
		batch = append(batch, newReport(id, &Answer{Err: answerTaken}, time.Time{}))
	}
	if len(batch) > 0 {
		if err := c.sendReports(ctx, batch); err != nil {
			c.log.Warn("source does not know what is still being forwarded", "err", err)
		}
	}
	c.reporter.finish(ctx)
}

// sendReports sends one request with reports.
func (c *Client) sendReports(ctx context.Context, batch []*report) error {
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	body := batch[0].data
	if len(batch) > 1 {
		body = nil
		for _, one := range batch {
			body = append(body, one.data...)
		}
	}
	req := c.sourceRequest(ctx, http.MethodPost, c.opts.Source.JoinPath("responses"), bytes.NewReader(body))
	req.Header.Set("Content-Type", "application/http; msgtype=response") // RFC 9112 section 10.2
	resp, err := c.source.RoundTrip(req)
	if err != nil {
		return bare(err)
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 4<<10))
	if resp.StatusCode/100 != 2 {
		return &statusError{resp.StatusCode}
	}
	return nil
}

// clocks tell how old the events of a stream are, although no two machines
// agree on the time: of all events that a replica sent, the youngest was at
// least as old as its way took, so that what later ones have beside it is their
// age. It belongs to the stream's goroutine.
type clocks struct {
	began  time.Time             // now is counted from here: a clock that is set back or forth changes nothing
	offset map[string]*clockView // by replica
}

// clockView is the least difference of one replica's clock to ours, in this
// window and in the one before: clocks drift.
type clockView struct {
	least, before time.Duration
	turned        time.Time
}

// age is how long w has been on its way.
func (c *clocks) age(w *Webhook) time.Duration {
	now := c.began.Add(time.Since(c.began))
	passed := now.Round(0).Sub(w.Time)
	replica := replicaOf(w.ID)
	view := c.offset[replica]
	if view == nil {
		if len(c.offset) >= clocksLimit { // a source that makes them up
			c.offset = nil
		}
		if c.offset == nil {
			c.offset = map[string]*clockView{}
		}
		view = &clockView{passed, passed, now}
		c.offset[replica] = view
	}
	if now.Sub(view.turned) > ageWindow {
		if view.before = view.least; now.Sub(view.turned) > 2*ageWindow { // that says nothing of now
			view.before = passed
		}
		view.least, view.turned = passed, now
	}
	view.least = min(view.least, passed)
	return passed - min(view.least, view.before)
}

// memory remembers the ids of recent events and the answers to them, so that
// an event that arrives twice is forwarded once. What is under way is bounded
// by the slots, the rest by count, by bytes and by age; the zero value is ready.
type memory struct {
	mu      sync.Mutex
	entries map[string]*memoryEntry
	order   []*memoryEntry // the answered ones, oldest first
	bytes   int            // of order
	closed  bool           // nothing is taken any more
}

// memoryEntry is guarded by memory.mu.
type memoryEntry struct {
	id    string
	mode  string
	taken bool // it has a slot, or had one

	// Zero while the forward is under way.
	answer *Answer
	since  time.Time
	size   int
}

// begin reports whether id is new, and if not what is known of it.
func (m *memory) begin(id, mode string) (first, taken bool, answer *Answer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.entries[id]; e != nil {
		return false, e.taken, e.answer
	}
	if m.entries == nil {
		m.entries = map[string]*memoryEntry{}
	}
	m.entries[id] = &memoryEntry{id: id, mode: mode}
	return true, false, nil
}

// take notes that id is going to be forwarded, and calls told, unless m is closed:
// then it is forgotten.
func (m *memory) take(id string, told func()) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[id]
	if e != nil && m.closed {
		delete(m.entries, id)
		return false
	}
	if e != nil { // otherwise it is of a legacy server
		e.taken = true
		told()
	}
	return true
}

// close ends the taking of events, and returns what is being forwarded for a
// sender that waits.
func (m *memory) close() (ids []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	for id, e := range m.entries {
		if e.taken && e.answer == nil && respond(e.mode) {
			ids = append(ids, id)
		}
	}
	return ids
}

// finish keeps the answer to id, which is under way.
func (m *memory) finish(id string, a *Answer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[id]
	if e == nil || e.answer != nil {
		return
	}
	e.answer, e.since, e.size = a, time.Now(), len(id)+len(a.Body)+headerBytes(a.Headers)
	m.order = append(m.order, e)
	m.bytes += e.size
	for len(m.order) > memoryEvents || m.bytes > memoryBytes || time.Since(m.order[0].since) > memoryAge {
		old := m.order[0]
		m.order[0], m.order = nil, m.order[1:]
		m.bytes -= old.size
		delete(m.entries, old.id)
	}
}

// forget drops id, which is under way and was not forwarded.
func (m *memory) forget(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.entries, id)
}

// The event stream, read.

// message is one event of the stream. data is valid until the next call.
type message struct {
	name string // "message" when the stream gave none
	id   string // the last one the stream gave, as ids are sticky
	data []byte
}

// parser reads an event stream by the HTML standard, section 9.2.6
// (https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation).
// An event that the stream's end cuts off is never dispatched. id is read and
// kept as the standard says, retry is ignored.
type parser struct {
	r      io.Reader
	buf    []byte // buf[start:] is read and not yet a line
	start  int
	lf     bool // the last line ended in CR: an LF that follows is part of its end
	first  bool // a byte order mark may come
	err    error
	data   []byte
	hasAny bool // data holds a line, even an empty one
	name   string
	lastID string
}

var errTooLong = fmt.Errorf("line or event longer than %d bytes", lineLimit)

func newParser(r io.Reader) *parser { return &parser{r: r, first: true} }

// next returns the next event, or io.EOF at the end of the stream.
func (p *parser) next() (message, error) {
	if cap(p.data) > keepBuffer {
		p.data = nil
	}
	p.data, p.hasAny, p.name = p.data[:0], false, ""
	for {
		line, err := p.line()
		if err != nil {
			return message{}, err
		}
		if len(line) == 0 {
			if p.hasAny {
				return message{cmp.Or(p.name, "message"), p.lastID, p.data}, nil
			}
			p.name = ""
			continue
		}
		if err := p.field(line); err != nil {
			return message{}, err
		}
	}
}

// field takes one line that is not empty.
func (p *parser) field(line []byte) error {
	name, value, _ := bytes.Cut(line, []byte(":"))
	value = bytes.TrimPrefix(value, []byte(" "))
	switch string(name) {
	case "event":
		p.name = string(value[:min(len(value), 64)]) // longer names are none of ours
	case "data":
		if len(p.data)+len(value) >= lineLimit {
			return errTooLong
		}
		if p.hasAny {
			p.data = append(p.data, '\n')
		}
		p.data = append(p.data, value...)
		p.hasAny = true
	case "id":
		if bytes.IndexByte(value, 0) < 0 {
			p.lastID = string(value[:min(len(value), 256)])
		}
	}
	return nil
}

// line returns the next whole line without its end, which is CR, LF or CRLF.
func (p *parser) line() ([]byte, error) {
	searched := p.start
	for {
		if p.lf && p.start < len(p.buf) {
			if p.buf[p.start] == '\n' {
				p.start++
			}
			p.lf = false
			searched = max(searched, p.start)
		}
		if !p.lf && searched < len(p.buf) {
			if i := lineEnd(p.buf[searched:]); i >= 0 {
				end := searched + i
				line := p.buf[p.start:end]
				p.lf = p.buf[end] == '\r'
				p.start = end + 1
				if p.first {
					p.first = false
					line = bytes.TrimPrefix(line, []byte("\uFEFF"))
				}
				return line, nil
			}
			searched = len(p.buf)
		}
		if p.err != nil {
			return nil, p.err
		}
		if len(p.buf)-p.start > lineLimit {
			return nil, errTooLong
		}
		searched -= p.start
		p.fill()
		searched += p.start
	}
}

// lineEnd is the index of the first CR or LF, or -1. It looks at a little at a
// time: in a stream of one kind, the other is never near.
func lineEnd(b []byte) int {
	const window = 512
	for at := 0; at < len(b); at += window {
		near := b[at:min(at+window, len(b))]
		lf := bytes.IndexByte(near, '\n')
		if lf >= 0 {
			near = near[:lf]
		}
		if cr := bytes.IndexByte(near, '\r'); cr >= 0 {
			return at + cr
		}
		if lf >= 0 {
			return at + lf
		}
	}
	return -1
}

// fill reads once more behind what is there, moving or growing the buffer.
func (p *parser) fill() {
	rest := len(p.buf) - p.start
	switch {
	case rest == 0 && cap(p.buf) > keepBuffer:
		p.buf, p.start = nil, 0
	case p.start > 0 && (rest == 0 || len(p.buf) == cap(p.buf)):
		p.buf, p.start = append(p.buf[:0], p.buf[p.start:]...), 0
	}
	if len(p.buf) == cap(p.buf) {
		grown := make([]byte, len(p.buf), max(16<<10, 2*cap(p.buf)))
		copy(grown, p.buf)
		p.buf = grown
	}
	n, err := p.r.Read(p.buf[len(p.buf):cap(p.buf)])
	p.buf = p.buf[:len(p.buf)+n]
	p.err = err
}
